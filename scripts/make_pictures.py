"""Make docs/pictures/: the chat page and the curves of a PPO report, from a real run.

    python scripts/make_pictures.py               # trains a miniature of recipes/tiny.yaml first: 10 minutes
    python scripts/make_pictures.py --run DIR     # takes a finished run

The miniature is the recipe with a model of 0.9 million parameters and fewer steps. The chat page needs
Chromium (scripts/install_browser.sh) and playwright.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
MINIATURE = """
--tokenizer.vocab_size 2048 --pretrain.preset modern-nano
--pretrain.model '{"layers": 3, "width": 128, "heads": 4, "kv_heads": 2, "mlp_width": 384}'
--pretrain.fit.seconds 0 --pretrain.fit.steps 400 --pretrain.fit.compile false
--sft.fit.seconds 0 --sft.fit.steps 200 --reward.max_tokens 48 --reward.fit.steps 600
--ppo.min_correlation 0.3 --ppo.max_prompt_tokens 48 --ppo.max_new_tokens 24 --ppo.optim.learning_rate 0.001
--eval.max_prompt_tokens 48
"""
MESSAGES = ("Hi! How are you today?", "What do you like to do?")
SIZE = {"width": 900, "height": 560}
COLOURS = 64
"""Of a picture: enough for text and curves, and a small file."""


def train(folder: Path) -> Path:
    """Run the miniature; returns the run's directory."""
    command = [sys.executable, "-m", "chatwright", "run", "tiny", "--out", str(folder)]
    subprocess.run([*command, *shlex.split(MINIATURE)], check=True, cwd=ROOT)
    return folder / "tiny"


@contextmanager
def serving(run: Path, folder: Path) -> Iterator[str]:
    """A server with the run's model; its address."""
    log = folder / "server.txt"
    options = ["--port", "0", "--name", "tiny", "--store", str(folder / "conversations.db")]
    with log.open("w") as errors:
        command = [sys.executable, "-m", "chatwright", "serve", str(run), *options]
        server = subprocess.Popen(command, cwd=ROOT, stdout=errors, stderr=errors)
    try:
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text(encoding="utf-8"))):
            if server.poll() is not None:
                raise SystemExit(f"the server did not start:\n{log.read_text(encoding='utf-8')}")
            time.sleep(0.1)
        yield found.group()
    finally:
        server.terminate()
        server.wait()


def picture_of_the_chat(address: str, target: Path) -> None:
    """Talk to the model on the chat page and take a picture of it."""
    from playwright.sync_api import expect, sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=SIZE)
        page.goto(address)
        for message in MESSAGES:
            page.get_by_label("Message", exact=True).fill(message)
            page.keyboard.press("Enter")
            expect(page.locator(".answer.writing")).to_have_count(0, timeout=60_000)
            expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=60_000)
        page.screenshot(path=target)
        browser.close()


def shrink(source: Path, target: Path) -> None:
    """Write a picture with few colours, which makes it a fraction of its size."""
    from PIL import Image

    with Image.open(source) as picture:
        picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Make both pictures."""
    parser = argparse.ArgumentParser(description="Make the pictures of the documents.")
    parser.add_argument(
        "--run", type=Path, help="A finished run of recipes/tiny.yaml, in place of a new one."
    )
    chosen = parser.parse_args().run
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = chosen or train(folder)
        shrink(run / "ppo" / "curves.png", PICTURES / "curves.png")
        with serving(run, folder) as address:
            picture_of_the_chat(address, folder / "chat.png")
        shrink(folder / "chat.png", PICTURES / "chat.png")


if __name__ == "__main__":
    main()
