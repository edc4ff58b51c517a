"""The reference: a page for every name in the lists of ``docs/api``, and links to these pages.

A module's page, such as ``docs/api/torch/index.md``, names the module in its title and lists the
public names. Each of them gets a page, a row in a table with the first line of its docstring, and
a place in the navigation. Names in backticks, in docstrings and guides, link to those pages.
"""

import itertools
import re
from pathlib import Path
from xml.etree.ElementTree import Element

import griffe
from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from markdown.util import HTML_PLACEHOLDER_RE
from mkdocs.structure.files import File

_TITLE = re.compile(r"^# (.*): `(.*)`$", re.MULTILINE)
_PART = re.compile(r"^## (.*)\n\n((?:- `\w+`\n)+)", re.MULTILINE)
_PAGE = """---
title: {name}
---

::: {path}
    options: {{heading_level: 1}}
"""


class Module:
    """A module's page: its title and, by topic, its public names."""

    def __init__(self, page: Path) -> None:
        text = page.read_text()
        self.folder = page.parent.name
        self.title, self.name = _TITLE.search(text).groups()
        self.topics = {topic: re.findall(r"`(\w+)`", names) for topic, names in _PART.findall(text)}

    def __iter__(self):
        """Iterate over the public names."""
        return (name for names in self.topics.values() for name in names)

    def source(self, name: str) -> str:
        """Return the page of `name`, relative to the folder of pages."""
        return f"api/{self.folder}/{name}.md"


def modules(docs: Path) -> list[Module]:
    """Return the modules of the reference, in the order of its first page."""
    names = re.findall(r"\]\((\w+)/index.md\)", (docs / "api/index.md").read_text())
    return [Module(docs / f"api/{name}/index.md") for name in names]


class Reference:
    """Pages of the reference, and what names in backticks refer to."""

    def __init__(self, docs: Path) -> None:
        self.modules = modules(docs)
        self.package = griffe.load("matfact", search_paths=[docs.parent], resolve_aliases=True)
        self.module = None  # of the page that is being rendered
        self.paths: dict[str, list[str]] = {}
        for module in self.modules:
            self.paths[module.name] = [module.name]
            for name in module:
                for known in (name, f"{module.name}.{name}"):
                    self.paths.setdefault(known, []).append(f"{module.name}.{name}")

    def summary(self, module: Module, name: str) -> str:
        """Return the first line of the docstring of `name`."""
        described = self.package[f"{module.name}.{name}".removeprefix("matfact.")]
        return described.docstring.value.split("\n")[0] if described.docstring else ""

    def table(self, module: Module, names: list[str]) -> str:
        """Return a table of `names` with links and summaries."""
        rows = (f"| [`{name}`]({name}.md) | {self.summary(module, name)} |\n" for name in names)
        return "| Name | What it is |\n| --- | --- |\n" + "".join(rows)

    def target(self, text: str) -> str | None:
        """Return the path of what `text` names, or None.

        A plain word, such as ``save``, names an object only on pages of its own module.
        """
        name, _, member = text.removesuffix("()").partition(".")
        if name == "matfact":
            paths, member = self.paths.get(text, []), ""
        else:
            paths = self.paths.get(name, [])
        own = [path for path in paths if self.module and path == f"{self.module.name}.{name}"]
        if not own and (len(paths) != 1 or re.fullmatch("[a-z]+", text)):
            return None
        path = (own or paths)[0]
        return f"{path}.{member}" if member else path


class _Links(Treeprocessor):
    def __init__(self, md: Markdown, reference: Reference) -> None:
        super().__init__(md)
        self.reference = reference

    def _text(self, code: Element) -> str:
        """Return the text of an element, which Markdown extensions may have set aside."""
        text = code.text or ""
        stashed = HTML_PLACEHOLDER_RE.fullmatch(text)
        return self.md.htmlStash.rawHtmlBlocks[int(stashed[1])] if stashed else text

    def run(self, root: Element) -> None:
        for parent in list(root.iter()):
            if re.fullmatch("h[1-6]|a|pre|autoref", parent.tag):
                continue
            for place, child in enumerate(parent):
                if child.tag == "code" and (path := self.reference.target(self._text(child))):
                    link = Element("autoref", {"identifier": path, "optional": ""})
                    link.tail, child.tail = child.tail, None
                    link.append(child)
                    parent[place] = link


class _LinkExtension(Extension):
    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.reference = reference

    def extendMarkdown(self, md):  # noqa: N802
        # After inline code has been parsed, at priority 20.
        md.treeprocessors.register(_Links(md, self.reference), "reference", 15)


_reference: Reference | None = None


def on_config(config):
    """Add the pages to the navigation, and the links to Markdown."""
    global _reference
    _reference = Reference(Path(config.docs_dir))
    config.markdown_extensions.append(_LinkExtension(_reference))
    by_page = {module.source("index"): module for module in _reference.modules}

    def expanded(item):
        if isinstance(item, str):
            return item
        ((title, content),) = item.items()
        if isinstance(content, list):
            return {title: [expanded(part) for part in content]}
        if content not in by_page:
            return item
        module = by_page[content]
        parts = {
            topic: [module.source(name) for name in names] for topic, names in module.topics.items()
        }
        if len(list(module)) > 20:
            return {title: [content, *({topic: pages} for topic, pages in parts.items())]}
        return {title: [content, *itertools.chain(*parts.values())]}

    config.nav = [expanded(item) for item in config.nav]
    return config


def on_files(files, config):
    """Add the pages."""
    for module in _reference.modules:
        for name in module:
            content = _PAGE.format(name=name, path=f"{module.name}.{name}")
            files.append(File.generated(config, module.source(name), content=content))
    return files


def on_page_markdown(markdown, page, **_):
    """Note which module a page belongs to, and turn a module's lists into tables."""
    folder, _, name = page.file.src_uri.rpartition("/")
    by_folder = {f"api/{module.folder}": module for module in _reference.modules}
    module = _reference.module = by_folder.get(folder)
    if module and name == "index.md":
        markdown = _PART.sub(
            lambda part: f"## {part[1]}\n\n" + _reference.table(module, module.topics[part[1]]),
            markdown,
        )
        markdown = _TITLE.sub(lambda title: f"{title[0]} {{ #{module.name} }}", markdown)
    return markdown
