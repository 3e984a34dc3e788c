"""schemathesis over openapi.yaml: no 5xx, no answer that is off its schema."""
import pathlib
import subprocess
import sys

import pytest

from conftest import PATIENCE, SOURCE


@pytest.mark.slow
def test_every_operation(server, adapter, tmp_path):
    config = tmp_path / "schemathesis.toml"
    config.write_text("")
    program = pathlib.Path(sys.executable).parent / "schemathesis"
    run = subprocess.run(
        [str(program), "--config-file", str(config), "run", str(SOURCE / "openapi.yaml"), "--url", server.base, "--max-examples", "25", "--seed", "1",
         "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance",
         "--phases", "examples,coverage,fuzzing", "--generation-database", "none", "--request-timeout", "60", "--no-color", "--workers", "1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=500 * PATIENCE)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_served_description_is_the_file(server):
    answer = server.get("/openapi.yaml")
    assert answer.status == 200 and answer.body == (SOURCE / "openapi.yaml").read_bytes()
