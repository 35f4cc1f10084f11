"""Sphinx's settings for `make book`: README.md, docs/, the notebooks with their stored outputs, and the docstrings."""

import json
import os
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = os.environ.get("GITHUB_REPOSITORY", "")  # owner/name, which GitHub's workflows set

project = "Short-run MCMC"
author = "the srmcmc authors"
copyright = f"2026, {author}"
extensions = ["myst_nb", "sphinx_external_toc", "sphinx-mathjax-offline"]
extensions += ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
# The source folder is the repository's, so that links lead where they lead on GitHub.
external_toc_path = "docs/_toc.yml"
include_patterns = ["README.md", "docs/*.md", "notebooks/**.ipynb", "srmcmc_lib/embedded/NOTICE.md"]
exclude_patterns = [".*", "build", "data", "checkpoints", "figures", "**/.ipynb_checkpoints"]

nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # tables
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"  # docstrings write code in single backquotes, as Markdown does
nitpick_ignore_regex = [("py:.*", ".*")]  # torch and numpy have no index here

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["book.css"]
html_css_files = ["book.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}
if REPOSITORY:
    html_theme_options |= {
        "repository_url": f"https://github.com/{REPOSITORY}",
        "repository_branch": os.environ.get("GITHUB_REF_NAME", "main"),
        "use_repository_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }


def made_by(app, docname: str, source: list[str]) -> None:
    """Below a notebook's title: command, seconds and parameters of its figures, from figures/NAME/manifest.json."""
    file = ROOT / "figures" / Path(docname).name / "manifest.json"
    if not docname.startswith("notebooks/") or not file.exists():
        return
    made, notebook = json.loads(file.read_text()), json.loads(source[0])
    if all(f'"{name} = ' in source[0] for name in made["parameters"]):  # else they are older than the notebook
        values = ", ".join(f"{name} = {value!r}" for name, value in made["parameters"].items())
        line = (
            f"<details class='made-by'><summary>Figures: <code>make figures</code>, {made['seconds']:.0f} s</summary>"
            f"<p>On {made['device']}, threads: {made['threads']}, torch {made['versions']['torch']}. "
            f"Parameters: {escape(values) or 'none'}.</p></details>"
        )
        title, _, rest = "".join(notebook["cells"][0]["source"]).partition("\n")
        notebook["cells"][0]["source"] = f"{title}\n\n{line}\n{rest}"
        source[0] = json.dumps(notebook)


def plain(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are plain text: |x| is a norm and *shape an argument; a table becomes lines."""
    if what == "property":  # napoleon takes what stands before a colon for the type
        lines[:1] = lines[0].replace(": ", ":\n", 1).split("\n")
    kept = [line for line in lines if not line.startswith("|--")]
    lines[:] = [x if x.startswith("| ") else x.replace("|", r"\|").replace(" *", r" \*") for x in kept]


def setup(app) -> None:
    app.connect("source-read", made_by)
    app.connect("autodoc-process-docstring", plain, priority=400)  # before napoleon
