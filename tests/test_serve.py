"""The server: both routes, clients at once, refusals, and no word of a note in its log."""

import contextlib
import http.client
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import assert_input_error, communicate_or_kill, run_inference, start_python
from tiny import NOTES

from sft.cli import RunError, Stopped
from sft.inference import serve as server_module
from sft.inference.serve import LARGEST_BODY, MOST_NOTES, MOST_WAITING, listen, serve

TOKEN = "s3cret"
MARK = "Zebrafish"  # of a note
TEXTS = [note for note, _ in NOTES]
CHAT, SUMMARIES = "/v1/chat/completions", "/summaries"
SETTINGS = {"writing": "free", "max_new_tokens": 12}


def ask(port: int, path: str, body=None, token: str | None = TOKEN, **headers) -> tuple[int, dict, dict]:
    """(status, answer, headers); a POST if there is a body: text as it is, anything else as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    if body is not None:
        headers = {"Content-Type": "application/json"} | headers
        body = body if isinstance(body, str | bytes) else json.dumps(body)
    if token:
        headers = {"Authorization": f"Bearer {token}"} | headers
    with contextlib.closing(connection):
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), dict(answer.headers)


def chat_of(*notes: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": note} for note in notes], **more}


# ------------------------------------------------------------------------------- the command


@contextlib.contextmanager
def started(adapter, folder, writing):
    """(process, port) of the server as a user starts it, once it answers."""
    (folder / "token").write_text(f"{TOKEN}\n")
    with listen(0) as free:
        port = free.getsockname()[1]
    options = [
        "--serve",
        port,
        "--serve_token_file",
        folder / "token",
        "--writing",
        writing,
        "--batch_size",
        4,
    ]
    options += ["--max_new_tokens", SETTINGS["max_new_tokens"], "--model_path", adapter, "--device", "cpu"]
    process = start_python("sft_inference.py", *options)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if ask(port, "/health")[0] == 200:
                    break
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        yield process, port
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def port(adapters, tmp_path_factory):
    with started(adapters(), tmp_path_factory.mktemp("server"), "free") as (_, port):
        yield port


@pytest.fixture(scope="module")
def expected(specialist):
    return specialist.generate_batch(TEXTS, **SETTINGS)


def as_json(results: list[dict]) -> list[dict]:
    """Without confidences, whose last digit the batch moves."""
    return [{**result, "confidence": 0} for result in json.loads(json.dumps(results))]


def test_summaries_are_those_of_the_command_line(port, expected):
    status, answer, _ = ask(port, SUMMARIES, {"notes": TEXTS})
    assert status == 200
    assert as_json(answer["summaries"]) == as_json(expected)
    one = ask(port, SUMMARIES, {"note": TEXTS[0]})[1]
    assert as_json(one["summaries"]) == as_json(expected[:1])


def test_the_chat_form(port, expected):
    """Of a conversation, the last message is the note."""
    [model] = ask(port, "/v1/models")[1]["data"]
    messages = chat_of(TEXTS[1])["messages"] + [{"role": "assistant", "content": "x"}]
    messages += chat_of(TEXTS[0])["messages"]
    status, answer, _ = ask(port, CHAT, {"model": model["id"], "messages": messages, "stream": False})
    assert status == 200
    assert as_json([answer["result"]]) == as_json(expected[:1])
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected[0]["generated_summary"]}
    usage = answer["usage"]
    assert usage["prompt_tokens"] == expected[0]["n_prompt_tokens"]
    assert usage["total_tokens"] == expected[0]["n_prompt_tokens"] + expected[0]["n_new_tokens"]


def test_clients_at_once_get_what_each_would_get_alone(port, expected):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda note: ask(port, CHAT, chat_of(note)), TEXTS * 2))
    assert as_json([answer["result"] for _, answer, _ in answers]) == as_json(expected * 2)


BAD = [
    (SUMMARIES, "{", 422, "body: Invalid JSON"),
    (SUMMARIES, b"\xff\xfe", 422, "body: Invalid JSON"),
    (SUMMARIES, "[" * 100_000, 422, "body: Invalid JSON"),
    (SUMMARIES, '{"note": "half \\ud83d character"}', 422, "body: Invalid JSON"),
    (SUMMARIES, f'{{"note": "two\n{MARK} lines"}}', 422, r"a line break is \n"),
    (SUMMARIES, f'{{"note": {MARK}}}', 422, "send {"),
    (SUMMARIES, [MARK], 422, "send {"),
    (SUMMARIES, {}, 422, "note or notes"),
    (SUMMARIES, {"note": MARK, "notes": [MARK]}, 422, "note or notes"),
    (SUMMARIES, {"notes": []}, 422, "notes: "),
    (SUMMARIES, {"notes": MARK}, 422, "notes: "),
    (SUMMARIES, {"notes": ["x", 5]}, 422, "notes.1: "),
    (SUMMARIES, {"notes": ["x", None]}, 422, "notes.1: "),
    (SUMMARIES, {"notes": ["x"] * (MOST_NOTES + 1)}, 422, f"at most {MOST_NOTES}"),
    (SUMMARIES, {"notes": ["x", " \n\u200b"]}, 422, "the note is empty (number 2 of 2)"),
    (SUMMARIES, {"note": "x", f"{MARK} has fever": "x"}, 422, "(not shown): Extra inputs"),
    (SUMMARIES, {"note": "x", "temperature": 1}, 422, "temperature: Extra inputs"),
    (CHAT, {"messages": []}, 422, "messages: "),
    (CHAT, {"messages": [{"role": "user"}]}, 422, "messages.0.content: Field required"),
    (CHAT, {"messages": [{"role": "system", "content": MARK}]}, 422, "messages.0.role: "),
    (CHAT, {"messages": [{"role": "assistant", "content": MARK}]}, 422, "the last one is not the user's"),
    (CHAT, {"messages": [{"role": "user", "content": [MARK]}]}, 422, "messages.0.content: "),
    (CHAT, chat_of(MARK, temperature=0.7), 422, "temperature: "),
    (CHAT, chat_of(MARK, stream=True), 422, "stream: "),
    (CHAT, chat_of(MARK, model="gpt-4"), 422, "model: "),
    (CHAT, chat_of(" "), 422, "the note is empty"),
    (f"/{MARK}?q={MARK}", {"note": MARK}, 404, "there is POST /summaries"),
    # No redirection, which would send the note wherever the header Host says
    ("/summaries/", {"note": MARK}, 404, "there is POST /summaries"),
    (f"{SUMMARIES}?q={MARK}", None, 405, "there is POST /summaries"),
]


@pytest.mark.parametrize("path, body, status, words", BAD)
def test_bad_requests_are_refused_in_one_sentence(port, path, body, status, words):
    found, answer, _ = ask(port, path, body)
    assert found == status
    message = answer["error"]["message"]
    assert words in message
    assert "\n" not in message
    assert MARK not in message


@pytest.mark.parametrize(
    "headers, status, words",
    [
        ({"Authorization": "Bearer other"}, 401, "Authorization: Bearer"),
        ({"Authorization": f"Basic {TOKEN}"}, 401, "Authorization: Bearer"),
        ({"Authorization": "Bearer \xe9"}, 401, "Authorization: Bearer"),
        ({"token": None}, 401, "Authorization: Bearer"),
        ({"Host": "evil.example"}, 403, "Host"),
        ({"Host": "localhost.evil.example:80"}, 403, "Host"),
        ({"Content-Type": "text/plain"}, 415, "application/json"),
        ({"Content-Length": str(LARGEST_BODY + 1)}, 413, "bytes"),
        ({"Transfer-Encoding": "chunked"}, 411, "Content-Length"),
    ],
)
def test_requests_that_are_not_even_read(port, headers, status, words):
    found, answer, sent = ask(port, SUMMARIES, {"note": MARK}, **headers)
    assert (found, words in answer["error"]["message"]) == (status, True)
    assert ("www-authenticate" in sent) == (status == 401)
    assert not [name for name in sent if name.lower().startswith("access-control")]


def test_names_of_this_machine_and_types_with_a_charset(port, expected):
    headers = {"Host": "localhost", "Content-Type": "application/json; charset=utf-8"}
    assert ask(port, SUMMARIES, {"note": TEXTS[0]}, **headers)[0] == 200


def test_ctrl_c_ends_it_and_nothing_of_a_note_is_logged(adapters, tmp_path):
    with started(adapters(), tmp_path, "quote") as (process, port):
        assert ask(port, CHAT, chat_of(f"{MARK} bit the patient. " * 5))[0] == 200
        for path, body, status, _ in BAD:
            assert ask(port, path, body)[0] == status
        process.send_signal(signal.SIGINT)
        out, said = communicate_or_kill(process, 60)
    assert process.returncode == 130, said
    assert f"http://127.0.0.1:{port}" in said
    assert "finishing the summaries" in said
    assert MARK not in out + said
    assert "Traceback" not in said


# ------------------------------------------------------------------------------- the queue


class Writer:
    """A function that summarizes, in batches that the test lets go on."""

    def __init__(self):
        self.batches = []
        self.go = threading.Semaphore(0)

    def __call__(self, notes: dict[int, str]):
        self.batches.append(list(notes.values()))
        assert self.go.acquire(timeout=30)
        for number, note in notes.items():
            if note == "fails":
                raise ValueError(MARK)
            if note == "no memory":
                raise RunError("the model failed", "check it")
            yield number, {"note": note}


@pytest.fixture
def running(monkeypatch):
    """(writer, port, signals): a server that writes two notes at a time, and ends when there is a signal."""
    signals = []
    monkeypatch.setattr(server_module, "noted_signals", lambda then: contextlib.nullcontext(signals))
    writer = Writer()
    listener = listen(0)
    ended = []

    def run():
        try:
            serve(writer, 2, listener, b"")
        except Stopped as stopped:
            ended.append(stopped)

    thread = threading.Thread(target=run)
    thread.start()
    yield writer, listener.getsockname()[1], signals
    signals.append(signal.SIGTERM)
    writer.go.release(1000)
    thread.join(30)
    assert ended and ended[0].signal == signal.SIGTERM


def wait_until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("it did not happen")


def n_waiting(port: int) -> int:
    return ask(port, "/health")[1]["waiting"]


def test_requests_take_turns_and_wait_in_a_queue_with_an_end(running):
    """A note that comes alone does not wait for all of a long request."""
    writer, port, _ = running
    with ThreadPoolExecutor(20) as pool:
        many = pool.submit(ask, port, SUMMARIES, {"notes": [f"m{i}" for i in range(6)]})
        wait_until(lambda: writer.batches and n_waiting(port) == 4)
        one = pool.submit(ask, port, SUMMARIES, {"note": "one"})
        wait_until(lambda: n_waiting(port) == 5)
        rest = {"notes": ["x"] * MOST_NOTES}
        full = [pool.submit(ask, port, SUMMARIES, rest) for _ in range(MOST_WAITING // MOST_NOTES - 1)]
        wait_until(lambda: n_waiting(port) == 5 + MOST_NOTES * len(full))
        status, answer, headers = ask(port, SUMMARIES, rest)
        assert (status, headers["retry-after"]) == (503, "5")
        assert "too many notes" in answer["error"]["message"]
        writer.go.release(1000)
        assert [summary["note"] for summary in many.result()[1]["summaries"]] == [f"m{i}" for i in range(6)]
        assert one.result()[1] == {"summaries": [{"note": "one"}]}
        assert all(future.result()[0] == 200 for future in full)
    order = [note for batch in writer.batches for note in batch]
    assert order.index("one") < order.index("m4")
    assert max(map(len, writer.batches)) == 2


def test_notes_of_clients_that_hung_up_are_dropped(running):
    writer, port, _ = running
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, port, SUMMARIES, {"notes": ["a", "b"]})
        wait_until(lambda: writer.batches)
        gone = http.client.HTTPConnection("127.0.0.1", port)
        gone.request("POST", SUMMARIES, json.dumps({"note": "gone"}), {"Content-Type": "application/json"})
        wait_until(lambda: n_waiting(port) == 1)
        gone.close()
        time.sleep(0.6)
        last = pool.submit(ask, port, SUMMARIES, {"note": "c"})
        wait_until(lambda: n_waiting(port) == 2)
        writer.go.release(10)
        assert first.result()[0] == last.result()[0] == 200
    assert writer.batches == [["a", "b"], ["c"]]


@pytest.mark.parametrize("note, logged", [("fails", "ValueError"), ("no memory", "the model failed")])
def test_a_failure_ends_its_notes_and_not_the_server(running, capsys, note, logged):
    writer, port, _ = running
    writer.go.release(10)
    status, answer, _ = ask(port, SUMMARIES, {"note": note})
    assert (status, "log" in answer["error"]["message"]) == (500, True)
    assert ask(port, SUMMARIES, {"note": "fine"})[0] == 200
    said = capsys.readouterr().err
    assert logged in said
    assert MARK not in said


def test_a_signal_lets_what_was_begun_end_and_refuses_the_rest(running):
    writer, port, signals = running
    with ThreadPoolExecutor(2) as pool:
        begun = pool.submit(ask, port, SUMMARIES, {"notes": ["a", "b"]})
        wait_until(lambda: writer.batches)
        late = pool.submit(ask, port, SUMMARIES, {"note": "late"})
        wait_until(lambda: n_waiting(port) == 1)
        signals.append(signal.SIGTERM)
        writer.go.release(10)
        assert begun.result()[0] == 200
        assert late.result()[0] == 503
    assert writer.batches == [["a", "b"]]


def test_half_a_request_and_nonsense_are_no_errors_of_the_server(running, capsys):
    _, port, _ = running
    for sent in (b"POST /summaries HTTP/1.1\r\nHost: localhost\r\n", b"\x16\x03\x01nonsense\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(sent)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        head = "POST /summaries HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f'{head}Content-Length: 99\r\n\r\n{{"note": "{MARK}'.encode())
    wait_until(lambda: n_waiting(port) == 0)
    time.sleep(0.3)
    said = capsys.readouterr().err
    assert "error" not in said
    assert MARK not in said


def test_slow_clients_hold_nobody_up_for_long(running, monkeypatch, capsys):
    """Bodies that never come whole are given up, and as many at most are read at the same time."""
    monkeypatch.setattr(server_module, "BODY_SECONDS", 0.5)
    writer, port, _ = running
    writer.go.release(10)
    head = "POST /summaries HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(40)]
        for connection in slow:
            connection.sendall(f'{head}Content-Length: {LARGEST_BODY}\r\n\r\n{{"note": "{MARK}'.encode())
        assert ask(port, SUMMARIES, {"note": "fine"})[0] == 200
        for connection in slow:
            connection.settimeout(30)
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
    assert MARK not in capsys.readouterr().err


# ------------------------------------------------------------------------------- refusals


def test_what_keeps_it_from_starting(adapters, tmp_path):
    options = ["--model_path", adapters(), "--serve"]
    with listen(0) as taken:
        port = taken.getsockname()[1]
        assert_input_error(run_inference(*options, port), f"--serve {port}", "Address already in use")
    assert_input_error(run_inference(*options, 0), "--serve", "between 1 and 65535")
    both = run_inference(*options, 8000, "--clinical_note", MARK)
    assert_input_error(both, "--serve cannot be combined with --clinical_note")
    (tmp_path / "token").write_text("\n")
    empty = run_inference(*options, 8000, "--serve_token_file", tmp_path / "token")
    assert_input_error(empty, "token: not one word")
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError('none', name='fastapi')")
    missing = run_inference(*options, 8000, PYTHONPATH=str(tmp_path))
    assert_input_error(missing, "package fastapi is not installed", "install -r requirements_serve.txt")
