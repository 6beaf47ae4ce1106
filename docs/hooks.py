"""Of the site: the notebooks are pages of it, and so are the cards of what ships."""

from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File


@event_priority(100)  # before the plugin that executes notebooks
def on_files(files, config):
    """Adds the notebooks, which are beside the folder of all other pages, and `results.md`."""
    root = Path(config.docs_dir).parent
    for path in sorted(root.glob("notebooks/*.ipynb")):
        name = path.relative_to(root).as_posix()
        files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    cards = sorted(root.glob("ghn_jax/pretrained/*.md"))
    text = "\n\n".join(card.read_text().replace("../../docs/", "") for card in cards)
    files.append(File.generated(config, "results.md", content=text))
    return files
