"""Small checkpoints for the tests of weights, recorded by other libraries or random, and how they are compared."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViT, ViTConfig

FIXTURES = Path(__file__).parent / "fixtures"
TOKEN = FIXTURES / "official_token.npz"
TOLERANCE = 2e-5
"""Of the largest value of the output."""


def agree(found: torch.Tensor, expected: torch.Tensor | np.ndarray) -> None:
    expected = np.asarray(expected.detach() if isinstance(expected, torch.Tensor) else expected)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """To the bit, by name."""
    ones, others = one.state_dict(), other.state_dict()
    assert ones.keys() == others.keys()
    for name, tensor in ones.items():
        assert torch.equal(tensor, others[name]), name


# Files


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def recorded(case: str) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """The pictures (b c h w) that another library was given, and what it gave."""
    found = arrays(FIXTURES / f"{case}_io.npz")
    if "images_nhwc" in found:
        return torch.from_numpy(found.pop("images_nhwc")).permute(0, 3, 1, 2).contiguous(), found
    return torch.from_numpy(found.pop("images_nchw")), found


def saved(tmp_path: Path, there: dict[str, np.ndarray]) -> Path:
    path = tmp_path / "changed.npz"
    np.savez(path, **there)
    return path


def changed(tmp_path: Path, source: Path = TOKEN, **changes: Any) -> Path:
    """An .npz with tensors replaced, added, or (None) left away."""
    kept = arrays(source) | changes
    return saved(tmp_path, {name: array for name, array in kept.items() if array is not None})


# Models


def scramble(model: Any) -> Any:
    """Nothing is zero or one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.5 * (parameter.ndim == 1))
    return model.eval()


def random_model(config: ViTConfig, **head: Any) -> Classifier:
    """Of 5 classes, where nothing else is said."""
    found: Classifier = scramble(ClassifierConfig(config, **{"classes": 5, **head}).build())
    return found


def shaken_model(config: ViTConfig, pool: str = "class", **more: Any) -> Classifier:
    """A fresh one with noise on every tensor, so that heads, norms and positions matter."""
    model = ClassifierConfig(config, **{"classes": 5, "pool": pool, **more}).build(seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tokens(model: ViT, images: torch.Tensor) -> torch.Tensor:
    """All that come out of a backbone, prefix first."""
    features = model.features(images)
    return torch.cat([features.prefix, features.tokens], dim=1)


def pictures(config: ViTConfig) -> torch.Tensor:
    """Two of noise, of a model's own size."""
    return torch.randn(2, config.channels, *config.image, generator=torch.Generator().manual_seed(2))
