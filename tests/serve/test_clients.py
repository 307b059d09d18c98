"""Programs that people point at such a server: LangChain, the command line program `llm`, and schemathesis,
which sends whatever the server's own OpenAPI document allows, and more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from support.serving import DIALOGUES, Running

pytestmark = pytest.mark.filterwarnings("ignore")  # they are others' programs
BIN = Path(sys.executable).parent


def test_langchain(server: Running) -> None:
    langchain = pytest.importorskip(
        "langchain_openai", reason="langchain-openai is not installed: NOT covered here"
    )
    where = {"base_url": f"{server.url}/v1", "api_key": "unused", "model": "tiny/taught"}
    chat = langchain.ChatOpenAI(**where, temperature=0)
    answer = chat.invoke("hello")
    assert answer.content == DIALOGUES["hello"]
    assert answer.usage_metadata["output_tokens"] > 1
    assert "".join(piece.content for piece in chat.stream("snowman")) == DIALOGUES["snowman"]
    assert [one.content for one in chat.batch(["hello", "name?"])] == [DIALOGUES["hello"], DIALOGUES["name?"]]
    newer = langchain.ChatOpenAI(**where, temperature=0, use_responses_api=True)
    assert newer.invoke("hello").content[0]["text"] == DIALOGUES["hello"]
    texts = langchain.OpenAIEmbeddings(**where, check_embedding_ctx_length=False)
    assert len(texts.embed_documents(["hello", "name?"])) == 2


def test_langchain_tools(roomy_server: Running) -> None:
    langchain = pytest.importorskip(
        "langchain_openai", reason="langchain-openai is not installed: NOT covered here"
    )
    from pydantic import BaseModel

    class Weather(BaseModel):
        """The weather of a town."""

        town: Literal["Oslo", "Rome"]
        days: Literal[1, 2, 3]

    chat = langchain.ChatOpenAI(
        base_url=f"{roomy_server.url}/v1",
        api_key="unused",
        model="tiny/taught",
        temperature=0,
        max_tokens=300,
    )
    forced = chat.bind_tools([Weather], tool_choice="Weather").invoke("hello")
    (call,) = forced.tool_calls
    assert call["name"] == "Weather"
    Weather(**call["args"])
    for method in ("function_calling", "json_schema"):
        found = chat.with_structured_output(Weather, method=method).invoke("hello")
        assert isinstance(found, Weather), method


def test_the_program_llm(server: Running, tmp_path: Path) -> None:
    program = BIN / "llm"
    if not program.exists():
        pytest.skip("the program llm is not installed: NOT covered here")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f'- model_id: tiny\n  model_name: tiny/taught\n  api_base: "{server.url}/v1"\n', encoding="utf-8"
    )
    for more in ([], ["--no-stream"]):
        command = [
            program,
            "-m",
            "tiny",
            "hello",
            "-o",
            "temperature",
            "0",
            "--no-log",
            "--key",
            "unused",
            *more,
        ]
        told = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        )
        assert told.stdout.strip() == DIALOGUES["hello"], told.stderr


def test_schemathesis_finds_no_server_error(roomy_server: Running, tmp_path: Path) -> None:
    program = BIN / "st"
    if not program.exists():
        pytest.skip("schemathesis is not installed: NOT covered here")
    command = [
        *(
            program,
            "run",
            f"{roomy_server.url}/openapi.json",
            "--phases",
            "fuzzing,coverage",
            "--max-examples",
            "8",
        ),
        *(
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        ),
        *("--seed", "1", "--request-timeout", "60", "--no-color"),
    ]
    told = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert told.returncode == 0, told.stdout[-6000:]
    assert "POST /v1/chat/completions" in told.stdout or "passed" in told.stdout
