"""What a recipe of the paper has to say beside its numbers: where the paper is silent, or disagrees with itself."""

from collections.abc import Iterator

from vitrail.experiments.paper import CORPORA, PUBLIC, TABLE_4, UNCROPPED, UNFLIPPED
from vitrail.experiments.paper_results import VTAB_TASKS, Start


def pretraining_notes(start: Start) -> Iterator[str]:
    corpus = CORPORA[start.corpus]
    yield (
        "weight decay is rate x decay x weight (--decay adamw): the paper's Adam is Flax's of 2020, whose weight_decay is "
        "documented as 'AdamW style (relative to learning rate)'; biases, norms, tokens and positions do not decay here, "
        "of which the paper says nothing"
    )
    yield f"{corpus.held_out:.1%} of the training pictures are held out; the paper does not say what it kept back"
    if start.corpus == "jft":
        yield "JFT-300M is not public: --data needs pictures of your own, of which each has one class"
        yield "the linear decay ends at a rate of 1e-5 as in ImageNet-21k's released runs; for JFT the paper is silent"
    if start.corpus == "i21k":
        yield "about 12.4 million pictures after the authors' removal of duplicates (vision_transformer, issue 237)"
    if start.corpus == "imagenet":
        yield "sigmoid loss and head bias -6.9 are big_vision's for ImageNet (vit_i1k.py); the paper is silent"
    elif not start.model.startswith("BiT"):
        yield "sigmoid loss and head bias -10 are the authors' (vision_transformer, issues 2 and 34)"
    if start.corpus != "imagenet":
        yield "no gradient clipping: Table 3's caption has it for ImageNet alone"
    if start == Start("R50+ViT-L/32", "jft", 7):
        yield "Table 3 gives 2e-4, the text 'the exact setup' of ViT-L/32, which is 6e-4: the table is followed"
    if start == Start("R50+ViT-L/16", "jft", 7):
        yield "Table 6 prints 859 exaFLOPs, which its own 1668 for 14 epochs contradicts: half of that is 834"
    if start.model.startswith("BiT"):
        yield "the head is plain: BiT has no hidden layer; sigmoid loss and head bias as for the ViTs, which nothing says"
    if start.corpus == "jft" and start.epochs == 7 and start.model == "ViT-L/16":
        yield "Table 5's ViT-L/16 is the one of 14 epochs: vit-l16-jft"


def finetuning_notes(start: Start, task: str, size: int) -> Iterator[str]:
    row = TABLE_4[task]
    if len(row.rates) > 1:
        yield (
            f"Table 4 chooses the rate among {', '.join(f'{rate:g}' for rate in row.rates)} on {row.held_out:.0%} of the "
            f"training pictures, then trains on all of them: --sweep does; without it, {row.rate:g}, the public code's"
        )
        yield (
            f"without --sweep a run does not train on all of them: {row.held_out:.0%} (or the data's own validation "
            "pictures) choose its best epoch; with --validation 0 --evaluate-every 1e6 none are held out and the last "
            "weights are kept, as in B.1.1"
        )
    if task == "imagenet":
        yield "0.06 stands in Table 4 for ImageNet, and in B.1.1 for ResNets and hybrids alone: the table is followed"
    if task in VTAB_TASKS:
        yield "all 1,000 training pictures, none held out, and 384 px for all tasks; VTAB's score is the mean over the 19"
        yield "the paper takes BiT's pre-processing (resize, crop at random, flip), here Inception crops stand for its crops"
    if task in UNCROPPED:
        yield "no crops for structured tasks, as in BiT; which tasks is our reading"
    if task in UNFLIPPED:
        yield "no flips, which would turn the label, as in BiT; for which tasks is our reading"
    yield f"{row.warmup} steps of warm-up are the public code's, and so is no dropout (or 0.1, it says); the paper is silent"
    if start.model == "ViT-H/14" and not size:
        yield "384 is no multiple of 14: the official code's patches cover 378 of the 384 pixels, here pictures are 378"
    if size:
        yield f"Table 2's setting for ImageNet: {size} px and Polyak averaging by 0.9999, which Table 4 has not"
    if start.model.startswith("BiT"):
        yield "for ResNets the paper also ran BiT's own fine-tuning and reports the better of the two (B.1.1)"
    if start not in PUBLIC:
        yield f"no weights of {CORPORA[start.corpus].title} that the paper used are public: --weights takes a run of yours"
