"""The papers' experiments, one module each; run ``python -m benchmarks study NAME``.

A study is a module ``benchmarks/studies/some_name.py`` with

- a docstring, whose first line is the title;
- ``SEEDS``, the number of seeds of the full version;
- ``cells(quick)``, which yields a dict of plain values for each cell: all that its result depends
  on (data, sizes and epochs too), since finished cells are known by it. Each is run for every
  seed, which is added as ``cell["seed"]``, except where a cell fixes its own;
- ``run(cell)``, which returns a dict of results: numbers, strings, or dicts of such;
- ``table(rows)``, which returns Markdown, and ``figure(rows)``, which returns a matplotlib figure,
  from one `Row` per cell, averaged over seeds. Both must work with incomplete rows.
"""
