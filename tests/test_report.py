"""Reports: what is on the page, and that nothing a name or a file holds can break it or give a path away."""

import contextlib
import html
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image

from fastcr import report, train
from fastcr.config import Config
from fastcr.output.charts import POINTS
from fastcr.output.gallery import SIDE, Gallery, Shown
from fastcr.output.pages import POLICY
from fastcr.output.summary import Run, compare, duration
from fastcr.report import GENERATOR
from fastcr.runs.command_line import called, load_config, read_command_line
from tests.shared import PLAIN, curves_of, decoded

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = [
    *PLAIN, "--data.image_size", "32", "--data.loader", "torch", "--data.workers", "0", "--run.device", "cpu",
    "--run.steps", "3", "--run.log_every", "1", "--optim.epochs", "8", "--optim.batch_size", "8",
    "--moco.queue_size", "24",
]  # fmt: skip
CPU = ("--run.device", "cpu", "--data.workers", "0")
CLASS, FILE, RUN = "<script>alert(1)", "\"><img src=x onerror=alert('2')>&amp;.jpg", "run <b>\"'&"
VOID = {"meta", "img", "br", "wbr"}
MISSING = {  # section of results.json: what the page says where it was not measured
    "retrieval": ("retrieval (needs labelled images)", ""),
    "knn": ("kNN (needs a labelled training and test split)", ""),
    "linear": ("linear probe (needs the same)", ""),
    "few_label": ("linear probes with few labels (need the same)", ""),
    "localisation": ("where the attention lies (needs the objects' boxes)", " --data.boxes FILE.csv"),
}
SVG = "{http://www.w3.org/2000/svg}"
CHROMIUM = shutil.which("chromium") or ""


class Page(HTMLParser):
    """A page read strictly: every tag closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.text = text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and data.strip():  # lines and indents of the source do not show
            self.words.append(" ".join(data.split()))

    @property
    def words_shown(self) -> str:
        return "".join(self.words)

    def of(self, name: str, class_: str = "") -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == name and class_ in (attrs.get("class") or "")]


def trained(folder: Path, root: Path, *more: str) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*TINY, "--data.root", str(root), "--run.dir", str(folder), *more])
    return folder


@pytest.fixture(scope="module")
def hostile(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The birds with a class and files named to break a page."""
    root = Path(shutil.copytree(birds, tmp_path_factory.mktemp("hostile") / "pictures & <i>"))
    for split in ("train", "test"):
        first = sorted((root / split).iterdir())[0]
        for i, file in enumerate(sorted(first.iterdir())):
            file.rename(file.with_name(f"{i}{FILE}"))
        first.rename(first.with_name(CLASS))
    return root


@pytest.fixture(scope="module")
def finished(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / RUN, hostile)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """That run, for a test to change."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def made(tmp_path: Path, *args: object) -> Page:
    out = tmp_path / "page.html"
    report.main([*map(str, args), "--out", str(out), *CPU])
    text = out.read_text()
    for part in (str(tmp_path), "/tmp", os.path.expanduser("~") + "/", str(Path.cwd())):
        assert part not in text
    return Page(text)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit, match="2"):
        report.main([*map(str, args), *CPU])
    (line,) = capsys.readouterr().err.splitlines()
    return line


def change(run: Path, section: str, **values: Any) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content[section].update(values)
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def photos(page: Page) -> list[dict[str, str | None]]:
    return [attrs for attrs in page.of("img") if not (attrs["src"] or "").startswith("data:image/svg+xml")]


def charts(page: Page) -> list[ElementTree.Element]:
    sources = [attrs["src"] for attrs in page.of("img") if attrs not in photos(page)]
    assert len(sources) == len(page.of("figure", "chart"))
    return [ElementTree.fromstring(decoded(source, "svg+xml")) for source in sources]


def one_page(**change: Any) -> Page:
    """The page of a run that is not on disk."""
    run = Run("run", Config(), [], {}, Gallery(""))._replace(**change)
    return Page(report.page([run]))


def test_page_of_a_run_shows_all_of_it_and_needs_nothing_else(finished: Path, tmp_path: Path) -> None:
    page = made(tmp_path, finished, "--gallery", 4, "--queries", 3)
    results = json.loads((finished / "results.json").read_text())
    for part in (results, results["frozen_init"]):
        for scores in part["retrieval"].values():
            assert all(f"{score:.2f}" in page.words_shown for score in scores.values())
    assert RUN in page.words_shown
    assert "pictures & <i>/test: 32 images of 16 classes" in page.words_shown
    assert "3 of 3 steps, 0.375 of 8 epochs, batch 8" in page.words_shown
    for section in ("retrieval", "knn", "linear", "few_label", "localisation"):
        command = report_missing(section, RUN)
        assert (command in page.words_shown) == (section != "retrieval")
    assert len(charts(page)) == 7
    assert all(len(points) == 3 for chart in charts(page) for points in curves_of(chart))
    assert len(page.of("figure", "pair")) == 4
    assert len(page.of("figure", "image")) == 3 * (1 + 5)
    images = [Image.open(io.BytesIO(decoded(attrs["src"], "jpeg"))) for attrs in photos(page)]
    assert {image.size for image in images} == {(SIDE, SIDE)}
    assert len(images) == 2 * 4 + 3 * 6
    assert all(attrs["alt"] for attrs in page.of("img"))
    assert page.of("html") == [{"lang": "en"}]
    # nothing is fetched or run, whatever the names hold
    (policy,) = [attrs["content"] for attrs in page.of("meta") if "http-equiv" in attrs]
    assert policy == POLICY == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert all("scope" in attrs for attrs in page.of("th"))
    assert len(page.of("caption")) == len(page.of("table")) > 2
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in page.of("div", "scroll"))
    assert not {name for name, _ in page.tags} & {"script", "link", "iframe", "base", "object", "b", "i"}
    assert not [key for _, attrs in page.tags for key in attrs if key.startswith("on") or key in ("href", "srcset")]
    assert "http" not in re.sub('http-equiv|data:image/[^"]*', "", page.text)
    assert len(page.text) < 5_000_000


def report_missing(section: str, name: str) -> str:
    title, more = MISSING[section]
    return f"{title}{called('evaluate')} {shlex.quote(name)}{more}"


def test_names_are_shown_as_they_are(finished: Path, tmp_path: Path) -> None:
    page = made(tmp_path, finished, "--gallery", 32, "--queries", 0)
    assert CLASS in page.words_shown
    titles = [attrs.get("title") for _, attrs in page.tags]
    assert f"0{FILE}" in titles
    assert f"image: {CLASS}" in [attrs["alt"] for attrs in page.of("img")]


def test_settings_are_escaped_and_lose_their_folders(copied: Path, tmp_path: Path) -> None:
    change(copied, "model", weights="/home/somebody/secret/<u>w'\".pt")
    change(copied, "data", cache_dir="/home/somebody/elsewhere/cache")
    page = made(tmp_path, copied, "--gallery", 0, "--queries", 0)
    assert "<u>w'\".pt" in page.words_shown
    assert not [word for word in ("somebody", "secret", "elsewhere") if word in page.text]


@pytest.mark.parametrize("text", ["a\x00b\x1b[1m", "caf\udce9", "\ufffe"])
def test_what_no_page_may_hold_is_replaced(text: str) -> None:
    replaced = re.sub("[\x00-\x1f\ud800-\udfff\ufffe]", "\ufffd", text)
    image = Shown("data:,", text, text)
    page = one_page(name=text, results={"folder": text}, gallery=Gallery(text, [(image, "data:,")]))
    assert page.text.encode().count(replaced.encode()) > 6
    assert re.search("[\x00-\x09\x0b-\x1f\ud800-\udfff\ufffe]", page.text) is None
    assert page.of("figure", "pair")[0]["title"] == replaced in page.words_shown


def test_command_on_the_page_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    page = made(tmp_path, finished, "--gallery", 0, "--queries", 0)
    (command,) = [word for word in page.words if word.startswith(called("train"))]
    repeated, resume = read_command_line(shlex.split(command.removeprefix(called("train"))))
    own = load_config(finished / "config.yaml")
    assert (resume, str(repeated.data.root)) == (None, "pictures & <i>")
    assert replace(repeated, data=replace(repeated.data, root=own.data.root), run=own.run) == own
    assert repeated.run == replace(own.run, dir=None)


def test_several_runs_are_compared(copied: Path, finished: Path, tmp_path: Path) -> None:
    results = json.loads((copied / "results.json").read_text())
    results["retrieval"]["rationale"]["rank1"] = 99.5
    (copied / "results.json").write_text(json.dumps(results))
    change(copied, "optim", lr=0.0123)
    page = made(tmp_path, finished, copied, "--gallery", 1, "--queries", 1)
    best = re.findall(r'<td class="best">★ ([\d.]+)</td>', page.text)
    assert best.count("99.50") == 1
    assert len(best) >= 6
    assert page.words_shown.count("frozen init of") == 1  # the same of both
    assert f"frozen init of {RUN}, copied" in page.words_shown
    differing = page.words_shown.partition("Settings that differ")[2].partition("Losses")[0]
    assert "optim.lr0.030.0123" in differing
    assert "data.root" not in differing
    assert len(page.of("ul", "legend")) == 2
    assert len(page.of("details")) == 2 + 2  # the runs, the settings of each
    assert len(photos(page)) == 2 * (2 + 6)
    both = [chart for chart in charts(page) if len(curves_of(chart)) == 2]
    assert len(both) == 2
    assert all(curves_of(chart)[0] == curves_of(chart)[1] for chart in both)  # they are copies
    assert len(page.of("svg")) == len(page.of("li")) == 2 * 2


def test_comparison_has_every_pooling_but_no_map_that_does_not_look(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    maps = ("attention", "average", "gaussian", "uniform")
    results["localisation"] = {name: {"inside": 50.0} for name in maps}
    run = Run("run", load_config(finished / "config.yaml"), [], results, Gallery([], []))
    _, columns, _ = compare([run])
    assert {name for section, name, _ in columns if section == "retrieval"} == results["retrieval"].keys()
    assert "gaussian" in results["retrieval"]
    assert {name for section, name, _ in columns if section == "localisation"} == {"attention"}


def test_results_on_other_images_are_not_ranked(copied: Path, finished: Path, tmp_path: Path) -> None:
    results = json.loads((copied / "results.json").read_text())
    (copied / "results.json").write_text(json.dumps(results | {"images": 31}))
    page = made(tmp_path, finished, copied, "--gallery", 0, "--queries", 0)
    assert "★" not in page.text
    assert "not measured on the same images" in page.words_shown
    assert "31 images of 16 classes" in page.words_shown


def test_runs_of_one_name_are_told_apart(copied: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(copied, tmp_path / "elsewhere" / copied.name))
    page = made(tmp_path, copied, other, "--gallery", 0, "--queries", 0)
    assert "copied (1)" in page.words_shown
    assert "copied (2)" in page.words_shown


def test_a_run_in_progress_has_a_page(copied: Path, tmp_path: Path) -> None:
    for name in ("results.json", "weights.safetensors"):
        (copied / name).unlink()
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    (copied / "metrics.jsonl").write_text(f'{lines[0]}\n7\n{lines[1]}\n{{"step": 3, "lo')
    page = made(tmp_path, copied)
    assert "2 of 3 steps, 0.25 of 8 epochs (in progress, or stopped)" in page.words_shown
    assert "has not saved weights yet" in page.words_shown
    assert report_missing("retrieval", "copied") in page.words_shown
    assert len(charts(page)) == 7
    assert all(len(points) == 2 for chart in charts(page) for points in curves_of(chart))
    (copied / "metrics.jsonl").unlink()
    page = made(tmp_path, copied)
    assert "Nothing is logged yet" in page.words_shown
    assert charts(page) == []
    page = made(tmp_path, copied, Path(shutil.copytree(copied, tmp_path / "other")))
    assert "No run has been measured" in page.words_shown


def test_images_that_are_gone_are_left_out(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(copied, "data", root=str(tmp_path / "gone"))
    page = made(tmp_path, copied)
    assert "The images (gone) were not at hand" in page.words_shown
    assert photos(page) == []
    assert f"no folder {tmp_path / 'gone'}" in capsys.readouterr().out


def test_images_without_labels_are_neither_right_nor_wrong(finished: Path, flat: Path, tmp_path: Path) -> None:
    page = made(tmp_path, finished, "--data.root", flat, "--gallery", 2, "--queries", 2)
    assert len(page.of("figure", "image")) == 2 * 6
    assert not [mark for mark in ("✓", "✗") if mark in page.words_shown]
    assert "They have no labels" in page.words_shown
    assert page.of("figure", "right") == page.of("figure", "wrong") == []


def test_plain_moco_has_no_attention_to_show(hostile: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "moco", hostile, "--rationale.enabled", "False")
    page = made(tmp_path, run, "--gallery", 2, "--queries", 1)
    assert len(photos(page)) == 6
    assert "by the mean embedding" in page.words_shown
    assert "no attention to show" in page.words_shown
    assert "fit loss" not in page.words_shown
    assert "where the attention lies" not in page.words_shown


def test_released_branch_has_a_page(hostile: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "released", hostile, "--released.enabled", "True")
    page = made(tmp_path, run, "--gallery", 2, "--queries", 1)
    assert len(page.of("figure", "pair")) == 2
    assert "released variant, 32 detectors" in page.words_shown


def test_no_image_is_read_where_none_is_asked_for(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "embed", None)
    assert photos(made(tmp_path, finished, "--gallery", 0, "--queries", 0)) == []


def test_report_lands_in_the_run_and_replaces_reports_only(
    copied: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = ["--gallery", "0", "--queries", "0"]
    monkeypatch.chdir(tmp_path)
    report.main([str(copied), *CPU, *bare])
    before = (copied / "report.html").read_bytes()
    assert GENERATOR.encode() in before[:1000]
    assert before.startswith(b"<!DOCTYPE html>")
    assert capsys.readouterr().out.strip() == f"report: {copied}/report.html"
    (copied / "results.json").unlink()
    report.main([str(copied), *CPU, *bare])
    assert (copied / "report.html").read_bytes() != before
    report.main([str(copied), str(finished), *CPU, *bare])
    assert Path("report.html").is_file()

    Path("mine.html").write_text("<!DOCTYPE html>\n<p>fastcr.report</p>")
    assert "mine.html is not a report of fastcr" in refused(capsys, copied, "--out", "mine.html")
    assert Path("mine.html").read_text().endswith("<p>fastcr.report</p>")
    assert "is no file" in refused(capsys, copied, "--out", tmp_path)
    assert "no folder away" in refused(capsys, copied, "--out", "away/page.html")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name a run folder"),
        (["RUN", "RUN/."], "a run is named twice"),
        (["RUN", "--gallery", "-1"], "--gallery must be at least 0"),
        (["RUN", "--queries", "-1"], "--queries must be at least 0"),
        (["RUN", "--data.root", "nowhere"], "no folder nowhere"),
        (["nowhere"], "nowhere is not a run folder"),
        (["RUN", "--galery", "3"], "--galery"),
    ],
)
def test_mistakes_are_one_line(
    finished: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert message in refused(capsys, *(arg.replace("RUN", str(finished)) for arg in args))
    assert not (finished / "report.html").exists()


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_broken_results_are_named(copied: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (copied / "results.json").write_text(content)
    assert "results.json is broken" in refused(capsys, copied)


def test_chart_says_where_it_shows_means() -> None:
    long = [{"step": float(x), "lr": 1.0} for x in range(POINTS + 1)]
    assert "means of up to 2 records" in one_page(records=long).words_shown
    assert "means" not in one_page(records=long[1:]).words_shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.44, "0.4 s"), (59.9, "1 min 0 s"), (119.7, "2 min 0 s"), (7325, "2 h 2 min")]
)
def test_durations_are_for_people(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_without_matplotlib_the_page_says_how_to_get_charts(
    copied: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for runs in ([finished], [finished, copied]):
        page = made(tmp_path, *runs, "--gallery", 0, "--queries", 0)
        assert 'pip install "fastcr[report]"' in page.words_shown
        assert page.of("img") == page.of("svg") == []
        assert "rank-1" in page.words_shown


@pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed")
def test_browser_shows_it_at_a_phones_width(copied: Path, finished: Path, tmp_path: Path) -> None:
    """Nothing on the console, every image shown, and nothing wider than the window, which a page around it measures."""
    report.main([str(finished), str(copied), "--out", str(tmp_path / "page.html"), *CPU, "--queries", "2"])
    text = (tmp_path / "page.html").read_text().replace("<details>", "<details open>")
    looked = tmp_path / "looked.html"
    script = """addEventListener("load", () => { const frame = document.querySelector("iframe").contentDocument;
        const images = [...frame.images]; document.title = [frame.documentElement.scrollWidth, images.length,
        images.filter((image) => image.naturalWidth > 0).length].join(" "); });"""
    inside = html.escape(text)
    looked.write_text(
        f"<!DOCTYPE html><script>{script}</script><iframe width=390 height=800 srcdoc='{inside}'></iframe>"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--enable-logging=stderr", "--v=0", "--dump-dom"]  # fmt: skip
    done = subprocess.run([*command, looked.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert found is not None
    width, images, shown = map(int, found.groups())
    assert width <= 390
    assert images == shown == 2 * (2 * 12 + 2 * 6) + 2 + 2 * 7
