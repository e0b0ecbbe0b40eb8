"""What MkDocs does with links to files outside `docs/`, and with pages that are not translated."""

import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

DOCS = Path(__file__).parent
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\.\./([^)#]+)\)")
_FIGURE = re.compile(r"^(!\[[^\]]*\]\(([^)]+)\))$", re.M)
_UNTRANSLATED = (
    '<div class="admonition note"><p class="admonition-title">'
    '이 페이지는 아직 번역되지 않아 영어로 보여 드립니다.</p></div><div lang="en">{}</div>'
)


def _served(path: str) -> str:
    """Where the site has a file of the repository: figures and notebooks as they are, text for a browser to show."""
    return f"repository/{path}" if path.endswith((".png", ".ipynb")) else f"repository/{path}.txt"


@event_priority(-200)  # after i18n, which makes all files anew
def on_files(files: Any, config: Any) -> Any:
    """Files of the repository that a page links to are served beside the pages."""
    linked = {path for page in DOCS.glob("*.md") for _, path in _LINK.findall(page.read_text(encoding="utf-8"))}
    for path in sorted(linked):
        source = DOCS.parent / path
        if source.is_file() and files.src_uris.get(_served(path)) is None:
            files.append(File.generated(config, _served(path), abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links to files of the repository lead to their copies, those to its folders are text; figures open full size."""

    def moved(link: re.Match[str]) -> str:
        text, path = link.groups()
        return f"[{text}]({_served(path)})" if (DOCS.parent / path).is_file() else text

    return _FIGURE.sub(r"[\1](\2)", _LINK.sub(moved, markdown))


def on_page_content(html: str, page: Any, config: Any, **_: Any) -> str:
    """A page that is not translated says so, and that it is in English."""
    language = config.theme["language"]
    if language != "en" and f".{language}" not in PurePosixPath(page.file.src_uri).suffixes:
        return _UNTRANSLATED.format(html)
    return html


def on_post_template(output: str, template_name: str, config: Any) -> str:
    """The site has one page for addresses that it does not have, the English one."""
    return "" if template_name == "404.html" and config.theme["language"] != "en" else output


def on_post_build(config: Any) -> None:
    """The theme looks for a map of the site in each language's folder."""
    site = Path(config.site_dir)
    for language in (folder for folder in site.iterdir() if (folder / "index.html").is_file()):
        shutil.copy(site / "sitemap.xml", language)
