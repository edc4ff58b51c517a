"""Pictures of the gallery: SVG, in the style of the package."""

from pathlib import Path

import matplotlib as mpl
from mkdocs_gallery.scrapers import matplotlib_scraper

from matfact._figures import style


def _svg(block, script):
    return matplotlib_scraper(block, script, format="svg", metadata={"Date": None})


def _styled(gallery_conf, file: Path | None) -> None:
    mpl.rcdefaults()
    mpl.rcParams.update(style())
    mpl.rcParams["savefig.transparent"] = True


conf = {"image_scrapers": (_svg,), "reset_modules": (_styled,)}
