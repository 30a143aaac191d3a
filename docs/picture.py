"""The README's picture from a page that `specprefill demo` wrote: python docs/picture.py specprefill-demo.html

Needs Chromium. The page is left as it is; in the copy that is photographed the document is scrolled to the answer.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = Path(__file__).parent / "images" / "demo.png"
SCROLLED = """
<style>#document { max-height: 330px; overflow: hidden; position: relative; } main { padding-top: 40px; }</style>
<script>
const box = document.getElementById("document"), fact = box.querySelector(".f");
if (fact) box.scrollTop = fact.offsetTop - 110;
</script>
"""


def main(page: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("picture.py: Chromium not found")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(page.read_text(encoding="utf-8").replace("</body>", SCROLLED + "</body>"), encoding="utf-8")
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        # fmt: off
        subprocess.run([
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={folder}/profile", "--window-size=1060,1760", f"--screenshot={TARGET}", copy.as_uri(),
        ], check=True, timeout=120, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # fmt: on
    print(f"{TARGET}: {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
