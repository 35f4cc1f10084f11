"""One page with all figures of a profile: figures/<profile>/index.html, written when `make figures` is done."""

import json
from html import escape
from pathlib import Path

from . import profiles, runner

STYLE = """body {font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem}
figure {margin: 1rem 0} img {max-width: 100%; background: white} figcaption, p {color: #555}"""


def page(profile: Path) -> Path:
    """Where the page of a profile is."""
    return runner.target(Path("any"), profile).with_name("index.html")


def write(profile: Path) -> Path:
    """Writes the page: each entry's figures beside each other, what they were made with, its executed notebook."""
    sections = []
    for entry in profiles.read_profile(profile):
        name, variant = profiles.split(entry)
        folder = runner.target(Path(name), profile, variant=variant)
        if (folder / "manifest.json").exists():
            sections.append(_section(entry, folder, name))
        else:
            sections.append(f"<h2>{escape(entry)}</h2><p>Not made yet.</p>")
    title = f"Figures of the profile {escape(profile.stem)}"
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    page(profile).parent.mkdir(parents=True, exist_ok=True)
    page(profile).write_text(f"{head}</head><body><h1>{title}</h1>{''.join(sections)}</body></html>", encoding="utf-8")
    return page(profile)


def _section(entry: str, folder: Path, notebook: str) -> str:
    made = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    parameters = ", ".join(f"{k} = {v!r}" for k, v in made["parameters"].items())
    revision = (made["git"] or {}).get("revision", "unknown")[:10]
    link = f'<a href="{escape(folder.name)}/{escape(notebook)}.html">the executed notebook</a>'
    facts = f"{made['seconds']:,} s on {made['device']}, revision {revision}; {parameters}"
    figures = "".join(
        f'<figure><img loading="lazy" src="{escape(folder.name)}/{escape(file.name)}" alt="{escape(file.stem)}">'
        f"<figcaption>{escape(file.stem)}</figcaption></figure>"
        for file in sorted(folder.glob("*.png"), key=lambda file: (file.stat().st_mtime_ns, file.name))
    )
    return f"<h2>{escape(entry)}</h2><p>{link}: {escape(facts)}</p>{figures}"
