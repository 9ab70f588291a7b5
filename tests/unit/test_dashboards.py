"""What Grafana is given is what the code says, and can be drawn."""

import itertools
import json
from pathlib import Path

import pytest
from headrace_client.commands.app import app
from headrace_client.dashboards.boards import BOARDS
from typer.testing import CliRunner

COMMITTED = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"


def test_the_committed_files_are_those_that_the_command_writes(tmp_path):
    result = CliRunner().invoke(app, ["dashboards", "--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    written = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    committed = {path.name: path.read_text() for path in COMMITTED.iterdir()}
    assert committed == written, "headrace dashboards --out deploy/grafana/dashboards"
    assert len(written) == len(BOARDS) == 6


def test_a_folder_that_can_not_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["dashboards", "--out", str(tmp_path / "file" / "below")])
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_panels_have_queries_and_places_of_their_own(board):
    panels = board.as_json()["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        columns, rows = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        assert columns.stop <= 24
        cells = set(itertools.product(columns, rows))
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["targets"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert json.dumps(board.as_json()).count("${datasource}") == sum(1 + len(p["targets"]) for p in panels) + len(
        board.choices
    )
