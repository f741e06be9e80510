"""The report's empty page, HTML and style, with @title and @body to fill in; light or dark, as the reader has it."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="Vitrail">
<title>@title</title>
<style>
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  --paper: #fdfdfc; --ink: #22242a; --soft: #6b6f78; --line: #e4e4e0; --pane: #f4f4f1; --accent: #3f78d8;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171b; --ink: #e3e4e8; --soft: #9599a3; --line: #2b2e35; --pane: #1d2026; --accent: #6c9bea; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3rem 1.5rem 6rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 var(--font); font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
.panes { display: flex; gap: 3px; height: 6px; width: 7.5rem; margin-bottom: 2.5rem; }
.panes i { flex: 1; border-radius: 1px; }
.origin { margin: 0; color: var(--soft); }
h1 { margin: .1em 0 .05em; font-size: 5.2rem; line-height: 1; font-weight: 300; letter-spacing: -.03em; }
h1 .unit { font-size: .45em; letter-spacing: 0; }
h2 {
  margin: 3.6rem 0 1.1rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.15rem; font-weight: 600;
}
.lead { margin: .6rem 0 2rem; font-size: 1.15rem; }
.note { color: var(--soft); max-width: 44rem; margin: 0 0 1.2rem; }
.note b { color: var(--ink); font-weight: 600; }
.unit, .soft { color: var(--soft); white-space: nowrap; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 3rem; margin: 0; }
.figures dt { color: var(--soft); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.5rem; line-height: 1.3; }
.figures .unit { font-size: .7em; }
.figures .between { display: block; font-size: .8rem; color: var(--soft); }
svg { display: block; margin: 0 auto; height: auto; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1.4rem 1rem; }
.mistakes figure { margin: 0; min-width: 0; }
.frame { aspect-ratio: 1; background: var(--pane); border-radius: 3px; overflow: hidden; }
.frame img { display: block; width: 100%; height: 100%; object-fit: contain; }
.frame .pixelated { image-rendering: pixelated; }
.triples { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1.4rem 2rem; }
.triples figure { margin: 0; min-width: 0; }
.triple { display: grid; grid-template-columns: repeat(3, 1fr); gap: 4px; }
.triple img { width: 100%; border-radius: 3px; }
.triple .pixelated { image-rendering: pixelated; }
figcaption { margin-top: .4rem; font-size: .82rem; line-height: 1.4; }
figcaption b { font-weight: 600; }
.beside { display: flex; flex-wrap: wrap; gap: 2rem; align-items: center; }
.beside > * { flex: 1 1 18rem; min-width: 0; }
.beside > .wide { flex: 2 1 26rem; }
.beside > .wide:empty { display: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { color: var(--soft); font-weight: 400; font-size: .82rem; white-space: nowrap; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.beside th:nth-child(2), .beside td:nth-child(2) { text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
.bar { display: block; width: 9rem; max-width: 20vw; height: .5rem; background: var(--pane); border-radius: 2px; }
.bar i { display: block; height: 100%; background: var(--accent); border-radius: 2px; }
.facts { margin: 0; font-size: .9rem; columns: 2; column-gap: 3rem; }
.facts div {
  display: flex; justify-content: space-between; gap: 1.5rem; padding: .22rem 0; border-bottom: 1px solid var(--line);
  break-inside: avoid;
}
.facts dt { color: var(--soft); white-space: nowrap; }
.facts dd { margin: 0; text-align: right; }
pre {
  margin: 0 0 1.2rem; padding: .9rem 1.1rem; background: var(--pane); border-radius: 4px; white-space: pre-wrap;
  font: .88rem/1.5 ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", monospace;
}
details { margin-top: .8rem; }
summary { cursor: pointer; color: var(--soft); margin-bottom: .6rem; }
@media (max-width: 40rem) { .facts { columns: 1; } h1 { font-size: 3.6rem; } }
@media print { section { break-inside: avoid; } body { padding-top: 0; } }
</style>
</head>
<body>
<div class="panes" aria-hidden="true"><i style="background:#c2405a"></i><i style="background:#d98a1f;flex:2"></i><i
style="background:#3c9a6d"></i><i style="background:#3f78d8;flex:3"></i><i style="background:#7a55b8"></i></div>
<main>
@body
</main>
</body>
</html>
"""
