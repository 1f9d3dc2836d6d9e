"""GraphiQL, working without internet.

The page is Strawberry's, with three changes: its files come from `api/static/graphiql/` where set-up has put them
(otherwise the page loads them from where it always does), the script that starts it is ours (`graphiql_page.js`:
token from the URL fragment or the headers pane, example operations as tabs), and a Content-Security-Policy allows
what the page needs and nothing else. The integrity hashes stay, so a file that was tampered with does not run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from strawberry.http.ides import get_graphql_ide_html

STATIC_PATH = "/static"
STATIC_DIRECTORY = Path(__file__).parent / "static"
_FILES_DIRECTORY = STATIC_DIRECTORY / "graphiql"
_FILE = re.compile(r'(?P<attribute>src|href)="(?P<url>https://[^/"]+/(?P<file>[^"]+))"')
_INLINE_SCRIPT = re.compile(r"<script>.*?</script>", re.DOTALL)
_START = f'<script src="{STATIC_PATH}/graphiql_page.js"></script>'


@dataclass(frozen=True, slots=True)
class GraphiqlPage:
    html: str
    headers: dict[str, str]
    local: bool


def make_page(files: Path = _FILES_DIRECTORY) -> GraphiqlPage:
    """The page, with local files when `files` holds every one that it names."""
    html, replaced = _INLINE_SCRIPT.subn(_START, get_graphql_ide_html("graphiql"))
    if replaced != 1:
        raise RuntimeError("Strawberry's GraphiQL page is not the one that is known")
    html = html.replace("Strawberry GraphiQL", "navstream GraphiQL")
    named = [match["file"] for match in _FILE.finditer(html)]
    local = bool(named) and all((files / name).is_file() for name in named)
    origins = {urlsplit(match["url"]).netloc for match in _FILE.finditer(html)}
    if local:
        html = _FILE.sub(rf'\g<attribute>="{STATIC_PATH}/graphiql/\g<file>"', html)
    return GraphiqlPage(html, _headers("" if local else "".join(f" https://{host}" for host in sorted(origins))), local)


def _headers(foreign: str) -> dict[str, str]:
    policy = {
        "default-src": "'none'",
        "script-src": f"'self'{foreign}",
        # CodeMirror and GraphiQL style their elements in place.
        "style-src": f"'self' 'unsafe-inline'{foreign}",
        "img-src": "'self' data:",
        "font-src": f"'self' data:{foreign}",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-store",
    }
