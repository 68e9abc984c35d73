"""`nlm report`: what it reads of runs, and the page it makes of them, in a real browser."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from nlm import read_layers
from nlm.config import Config
from nlm.statistics.draw import MAIN
from nlm.statistics.page import write_page
from nlm.statistics.report import report
from nlm.statistics.runs import read_runs
from nlm.statistics.store import LayerWriter
from nlm.train import train

RunConfig = Callable[..., Config]
QUANTITIES = {"grad_norm", "weight_norm", "update_ratio", "stream_rms_in", "branch_rms", "stream_rms_out"}


def page_of(runs: list[Path], out: Path) -> str:
    return write_page(read_runs(runs), out).read_text(encoding="utf-8")


def test_report_of_two_runs(run_config: RunConfig, tmp_path: Path) -> None:
    runs = [train(run_config(f"{folder}/run")) for folder in ("a", "b")]
    html, overview, *pictures = report(runs, tmp_path / "out")
    assert (html, overview) == (tmp_path / "out" / "report.html", tmp_path / "out" / "overview.png")
    assert {p.parent.name for p in pictures} == {"a-run", "b-run"}
    assert {p.stem for p in pictures} >= QUANTITIES | {f"{quantity}-profile" for quantity in QUANTITIES & set(MAIN)}
    assert all(imread(picture).std() > 0.02 for picture in (overview, *pictures)), "not blank"


def test_report_without_statistics_draws_the_losses(run_config: RunConfig, tmp_path: Path) -> None:
    run = train(run_config("bare", statistics={"enabled": False}))
    html, overview = report([run], tmp_path / "out")
    assert overview.name == "overview.png"
    assert "Loss" in html.read_text() and "Layer by layer" not in html.read_text()


def test_report_names_each_run_once(run_config: RunConfig, tmp_path: Path) -> None:
    run = train(run_config("run"))
    with pytest.raises(ValueError, match="name each once"):
        list(report([run, run], tmp_path))


def test_the_page_needs_nothing_else(run_config: RunConfig, tmp_path: Path) -> None:
    """No address of anything in it, but for the names of XML's vocabularies."""
    html = page_of([train(run_config("run"))], tmp_path / "page.html")
    assert set(re.findall(r"https?://[^\s\"'<>)]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"<(link|script|img)[^>]*(href|src)=\"(?!data:|#)", html)


def test_the_page_says_what_was_skipped_and_where_it_ran(run_config: RunConfig, tmp_path: Path) -> None:
    first, second = (train(run_config(name, optim={"lr": lr})) for name, lr in (("first", 1e-3), ("second", 2e-3)))
    (first / "faults.jsonl").write_text(
        '{"step": 7, "batch": 7, "left_out": true, "loss": 5.25, "grad_norm": Infinity}\n'
        '{"step": 9, "to": 4, "next_batch": 10, "suspect": "the first to go bad is layer 1"}\n'
    )
    alarm = {
        "step": 6,
        "layer": 2,
        "metric": "grad_norm/q",
        "expected": 0.5,
        "seen": 9.5,
        "since": 5,
        "text": "<b> & 9",
    }
    (second / "alarms.jsonl").write_text(json.dumps(alarm) + "\n" + '{"half a li')
    text = unescape(re.sub(r"<[^>]+>", " ", page_of([first, second], tmp_path / "page.html")))
    text = re.sub(r"\s+", " ", text)
    assert "left out: loss 5.25, gradient norm inf" in text
    assert "went back to step 4; the first to go bad is layer 1" in text
    assert "second 6 2 grad_norm/q 0.5 9.5 5 <b> & 9" in text
    assert "optim.lr 0.001 0.002" in text and "model.dim" not in text, "only what differs"
    assert "attention flash attention flash attention" in text and "optimizer one fused kernel" in text


def test_a_run_of_an_older_version_that_is_going_on(run_config: RunConfig, tmp_path: Path) -> None:
    run = train(run_config("run"))
    (run / "environment.json").unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: record[key] for key in record if key not in ("tflops_per_rank", "mfu")} for record in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept) + '{"step": 9, "lo')
    assert "an older version" in page_of([run], tmp_path / "page.html")
    shutil.rmtree(run / "layers")  # the first step is logged, its statistics are not yet
    assert "Layer by layer" not in page_of([run], tmp_path / "page.html")


# in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

WATCH = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
const say = console.error; console.error = (...words) => { errors.push(words.join(" ")); say(...words); };
</script>"""

USE = """<script>
addEventListener("load", async () => {
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  const images = [...document.images];
  images.forEach((image) => { image.loading = "eager"; });
  const whole = (image) => image.decode().then(() => image.naturalWidth > 0, () => false);
  const decoded = await Promise.all(images.map(whole));
  const hides = (image) => image.clientHeight < image.naturalHeight || image.clientWidth < image.naturalWidth;
  const [frame] = document.querySelectorAll(".frame");
  const box = frame.querySelector("img").getBoundingClientRect();
  const readout = frame.closest("figure").querySelector(".readout");
  const at = (x, y) => {
    const where = { clientX: box.left + x * box.width, clientY: box.top + y * box.height, bubbles: true };
    frame.dispatchEvent(new PointerEvent("pointermove", where));
    return readout.textContent;
  };
  const hovered = [at(0.01, 0.99), at(0.99, 0.01), at(0.5, 0.5)];
  frame.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
  const result = {
    errors, decoded, hovered, cramped: images.filter(hides).length, pressed: readout.textContent,
    width: [document.documentElement.scrollWidth, innerWidth],
  };
  const place = document.createElement("pre");
  place.id = "result";
  place.textContent = JSON.stringify(result);
  document.body.append(place);
});
</script>"""


def in_browser(html: str, folder: Path, width: int) -> dict[str, Any]:
    """What the page does under a hand, in Chromium."""
    used = html.replace("<head>", f"<head>{WATCH}", 1).replace("</body>", f"{USE}</body>", 1)
    (folder / "used.html").write_text(used, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom", f"file://{folder}/used.html"]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    (result,) = re.findall(r'<pre id="result">(.*?)</pre>', dom)
    return json.loads(unescape(result))  # type: ignore[no-any-return]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not opened (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_in_a_browser(width: int, run_config: RunConfig, tmp_path: Path) -> None:
    """Every image is whole, values are read under the pointer and by keys, nothing is wider than the window."""
    runs = [train(run_config(name, {"scheme": {"name": name}, "n_layers": 5})) for name in ("pre_ln", "deepnorm")]
    seen = in_browser(page_of(runs, tmp_path / "page.html"), tmp_path, width)
    assert seen["errors"] == []
    assert len(seen["decoded"]) > 50 and all(seen["decoded"])
    wide, window = seen["width"]
    assert wide <= window

    layers = read_layers(runs[0])
    first, last, middle, below = (
        re.fullmatch(r"layer (\d+), step (\d+): (\S+)", words).groups() for words in (*seen["hovered"], seen["pressed"])
    )
    assert first[:2] == ("0", "1") and last[:2] == ("4", "8") and middle[:2] == ("2", "5") and below[:2] == ("1", "5")
    scale = 10.0 ** (4 / 254)  # a step of the palette over four decades, and two digits
    for layer, step, value in (first, last, middle, below):
        expected = layers["grad_norm/layer"][list(layers["step"]).index(int(step)), int(layer)]
        assert np.log(float(value) / expected) == pytest.approx(0, abs=np.log(scale) + 0.05)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not opened (apt-get install chromium)")
def test_a_browser_has_room_for_a_thousand_layers(run_config: RunConfig, tmp_path: Path) -> None:
    """No cell is narrower than a pixel, and so none is left out; the one that stands out is read as such."""
    run = train(run_config("run", train={"steps": 1}))
    values = np.random.default_rng(0).uniform(0.5, 2.0, (500, 1000)).astype(np.float32)
    values[249:252, 499:501] = 5e4
    with LayerWriter(run, 1000, 0) as writer:
        for step, row in enumerate(values, start=1):
            writer.write(step, {"grad_norm/layer": row})
    seen = in_browser(page_of([run], tmp_path / "page.html"), tmp_path, 500)
    assert seen["errors"] == [] and seen["cramped"] == 0
    words = re.fullmatch(r"layers (\d+)–(\d+), steps? \d+\S*: (\S+)", seen["hovered"][2])
    assert words and int(words[1]) <= 500 <= int(words[2]) + 1 and float(words[3]) == pytest.approx(5e4, rel=0.05)
