"""One result as a self-contained HTML page, for a person: of a conversion, of ``verify``, of ``diff``.

    result -> parts (sections, problems, pictures, tables) -> markup

The page loads nothing. Names from a checkpoint are text in it, never markup.
"""

from __future__ import annotations

from ckpt_tools.cli.page.commands import shell_line as shell_line
from ckpt_tools.cli.page.parts import Page as Page
from ckpt_tools.cli.page.rendering import rendered as rendered
