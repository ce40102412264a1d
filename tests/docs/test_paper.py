"""Every row of docs/paper.md resolves: symbols import, configs build, commands exist, values are the paper's."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

DOC = Path(__file__).parents[2] / "docs" / "paper.md"
TEXT = DOC.read_text()
NOT_YET = "not yet in the library"

# From the paper: AP, AP of small, medium and large objects.
VALUES = {
    "Table 1": """37.4 20.6 40.7 49.7 39.6 22.7 43.3 52.5 40.8 22.7 44.5 55.3 40.7 22.9 45.0 54.7 41.0 23.3 45.0 55.4 41.1 23.6 45.4
        54.8 41.2 23.9 45.4 54.9 39.2 22.9 42.6 51.2 41.7 23.4 45.3 55.8 41.2 23.1 45.4 54.7 42.1 23.7 46.2 55.7 42.3 23.6 46.3 56.4
        42.5 23.6 46.8 56.4 42.4 24.7 46.7 55.9 38.6 22.5 42.2 50.4 40.6 23.4 44.6 53.0 42.0 24.1 46.1 55.0 42.0 24.0 45.7 55.6 42.3
        24.4 46.2 55.9 43.0 25.2 47.3 56.9 43.0 25.7 47.4 56.4""",
    "Table 2": "40.3 22.5 44.3 54.2 40.3 23.6 44.5 54.6 40.6 23.1 45.0 54.2 40.7 23.3 45.3 54.1 40.6 22.7 44.7 54.2 40.9 23.4 45.4 54.3",
    "Table 3": "40.3 22.5 44.3 54.2 40.6 22.8 44.9 54.4 40.6 23.8 45.2 53.9 40.7 22.9 45.0 54.7 40.9 23.4 45.4 54.3 41.2 23.9 45.4 54.9",
    "Table 4": "100 100 100 100 52.7 35.3 51.0 59.4 65.9 49.1 65.8 71.5 65.9 48.1 64.8 72.1 67.9 52.2 67.5 73.2 68.1 52.3 67.2 74.1",
    "Table 5": "96.7 82.88 13.82 78.26 18.44",
    "Table A.1": "42.2 42.2 42.4 42.1",
}  # fmt: skip
ROWS = {"Table 1": 21, "Table 2": 6, "Table 3": 6, "Table 4": 6, "Table 5": 3, "Table A.1": 4, "Figures": 7}


def tables() -> dict[str, list[dict[str, str]]]:
    """Rows by section heading; every row must have as many cells as its header."""
    found: dict[str, list[dict[str, str]]] = {}
    section, header = "", None
    for line in TEXT.splitlines():
        if line.startswith("## "):
            section = line[3:].partition(":")[0]
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
        elif not set(line) <= set("|-"):
            assert len(cells) == len(header), line
            assert all(cells), f"an empty cell: {line}"
            found.setdefault(section, []).append(dict(zip(header, cells, strict=True)))
    return found


TABLES = tables()
SYMBOLS = sorted(set(re.findall(r"`(ikd_fast(?:\.\w+)+)`", TEXT)))
LINKS = sorted(set(re.findall(r"\]\(([^)]+)\)", TEXT)))
CONFIGS = sorted({link for link in LINKS if link.startswith("../configs/")})
COMMANDS = sorted(
    {line.partition("#")[0].strip() for line in TEXT.splitlines() if line.startswith(("ikd-fast ", "torchrun "))}
    | set(re.findall(r"`(ikd-fast [^`]+)`", TEXT))
)  # fmt: skip


def test_every_equation_algorithm_line_table_and_figure_is_there():
    assert [row["Paper"] for row in TABLES["Equations"] if row["Paper"].startswith("Eq.")] == [f"Eq. {i}" for i in range(1, 8)]  # fmt: skip
    lines = [row["Line"] for row in TABLES["Algorithm 1"]]
    assert [line for line in lines if line.isdigit()] == [str(i) for i in range(1, 9)]
    assert {name: len(TABLES[name]) for name in ROWS} == ROWS
    assert [row["Figure"] for row in TABLES["Figures"]] == [str(i) for i in range(1, 8)]


@pytest.mark.parametrize("name", VALUES)
def test_the_papers_values(name):
    written = " ".join(row["Paper"] for row in TABLES[name])
    assert re.findall(r"\d+\.?\d*", written) == VALUES[name].split()


@pytest.mark.parametrize("name", VALUES)
def test_every_row_says_where_it_stands(name):
    for row in TABLES[name]:
        if row["Config"] == NOT_YET:
            assert row["Here"] == NOT_YET
        else:
            assert re.fullmatch(r"\[([\w.-]+)\]\(\.\./configs/ikd/\1\.py\)", row["Config"]), row
            assert re.fullmatch(r"not run at this scale, \d+ GPU hours( \(estimate\))?", row["Here"]), row


def test_the_two_hours_of_the_paper_and_only_those_are_no_estimates():
    stated = {row["Here"] for name in VALUES for row in TABLES[name] if row["Here"].endswith("hours")}
    assert stated == {f"not run at this scale, {8 * hours} GPU hours" for hours in (24, 27)}


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_symbols_import(symbol):
    if symbol.startswith("ikd_fast.mmdet"):
        pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
    parts = symbol.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        break
    for part in parts[n:]:
        found = getattr(found, part)


@pytest.mark.parametrize("link", [link for link in LINKS if not link.startswith("https://")])
def test_links_exist(link):
    assert (DOC.parent / link).is_file()


def test_every_config_of_the_paper_is_a_row(repo_root):
    """Those that say which table they are of; the others are in docs/losses.md."""
    files = (repo_root / "configs" / "ikd").glob("*.py")
    of_a_table = {path.name for path in files if re.match("# (Table|One gradient)", path.read_text())}
    assert {f"../configs/ikd/{name}" for name in of_a_table} == set(CONFIGS)


@pytest.fixture(scope="module")
def quick_zoo():
    """mmengine reads a folder's metafile anew for each `mmdet::` path; here once."""
    pytest.importorskip("mmengine", reason="needs the mmdet extra: pip install 'ikd_fast[mmdet]'")
    from mmengine.config import config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_get_external_cfg_path", functools.cache(config._get_external_cfg_path))
        yield


# The paper has no row of these.
OURS = [link for link in CONFIGS if "_single_" in link]


@pytest.mark.parametrize("link", OURS)
def test_configs_of_our_own_change_the_attack_alone(link, quick_zoo):
    from mmengine.config import Config

    path = (DOC.parent / link).resolve()
    ours, paper = (Config.fromfile(p) for p in (path, str(path).replace("_single", "")))
    sampler = paper.train_dataloader.pop("sampler").to_dict()
    assert sampler == dict(type="KeyedSampler", slots=16)
    assert ours.train_dataloader.pop("sampler").to_dict() == dict(type="DefaultSampler", shuffle=True)
    assert ours.train_dataloader == paper.train_dataloader
    ours, paper = ours.model.to_dict(), paper.model.to_dict()
    assert paper["adv"].pop("attack") == dict(
        type="OnlineDIFGSM", mode="carry", memory=dict(bits=4, stride=2, resolution="original")
    )
    assert ours["adv"].pop("attack") == dict(type="OnlineDIFGSM", mode="single")
    assert (paper["augment"].pop("crop_align"), ours["augment"].pop("crop_align")) == (8, 1)
    assert ours == paper


@pytest.mark.parametrize("link", [link for link in CONFIGS if link not in OURS])
def test_configs_build_and_name_the_same_value(link, quick_zoo):
    from mmengine.config import Config

    path = (DOC.parent / link).resolve()
    config = Config.fromfile(path)
    row = next(row for name in VALUES for row in TABLES[name] if link in row["Config"])
    assert (config.model.type == "IKDDistiller") is ("student" not in row["Row"])
    said = re.search(r"^# .*Paper: (\d+\.\d+)", path.read_text(), re.M)
    assert said
    assert row["Paper"].partition(",")[0] == said[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command, repo_root):
    pytest.importorskip("typer", reason="needs the cli extra: pip install 'ikd_fast[cli]'")
    import typer

    from ikd_fast.cli import app

    words = shlex.split(command)
    if words[0] == "torchrun":
        assert words[words.index("-m") + 1] == "ikd_fast.mmdet"
        assert (repo_root / "ikd_fast" / "mmdet" / "__main__.py").is_file()
        return
    sub = typer.main.get_command(app).commands[words[1]]
    known = {option for parameter in sub.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    for word in words:
        if word.startswith("configs/"):
            assert (repo_root / word).is_file()


def test_config_overrides_name_what_the_configs_have(quick_zoo):
    """`--cfg-options a.b.c=value` would also be taken where nothing of that name exists."""
    from mmengine.config import Config

    given = re.findall(r"--cfg-options ([^`]+)", TEXT)
    overrides = [part.partition("=")[0] for group in given for part in group.split()]
    assert len(overrides) == 4
    config = Config.fromfile(DOC.parents[1] / "configs/ikd/retinanet_x101-64x4d_r50_fgd_ikd_2x_coco.py")
    for override in overrides:
        value = config
        for part in override.split("."):
            value = value[part]
