"""Pages of the site that are kept elsewhere in the repository: the measured results, the change log, contributing."""

import re
from pathlib import Path

from mkdocs.structure.files import File


REPOSITORY = Path(__file__).parents[1]
PAGES = {"results.md": "benchmarks/RESULTS.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files, config):
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(REPOSITORY / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    # The pages' links work in the repository as well; here all pages lie in one folder.
    for target, source in {**PAGES, "index.md": "README.md"}.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}").replace(f"]({source}", f"]({target}")
    return markdown.replace("](../docs/", "](").replace("](docs/", "](") if page.file.src_uri in PAGES else markdown


def on_page_content(html, page, config, files):
    # Types as Transformers writes them, "`int`, *optional*", which the reference would not read as Markdown.
    return re.sub(r"<code>(`[^<]*)</code>", lambda match: f"<code>{re.sub('[`*]', '', match[1])}</code>", html)
