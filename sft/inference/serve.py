"""Summaries over HTTP, on this machine alone: POST /summaries, and the chat form of OpenAI's API. Knows a
function that summarizes, no model. Notes are patients' text: they are in answers, never in a log or an error.

The main thread writes summaries of all notes that wait together; another one talks to the clients. Needs
requirements_serve.txt."""

import asyncio
import hmac
import itertools
import re
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from queue import Empty, PriorityQueue
from typing import Literal

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect

from sft.cli import InputError, RunError, Stopped, log, noted_signals, safe_id
from sft.inference.results import FIXES, note_problem

MODEL = "specialist"
ROUTES = "POST /summaries, POST /v1/chat/completions, GET /v1/models, GET /health"
NOTES_FORM = 'send {"note": "..."} or {"notes": ["...", "..."]}'
CHAT_FORM = 'send {"messages": [{"role": "user", "content": "the note"}]}; settings are chosen when the server is started'
GONE = "the client has gone"
LARGEST_BODY = 4 * 2**20  # bytes
MOST_BODIES = 32  # that are read at the same time, for they lie in memory
BODY_SECONDS = 20  # until a body is there whole, on its way within this machine
MOST_NOTES = 64  # of one request
MOST_WAITING = 512  # notes
RETRY = {"Retry-After": "5"}  # seconds
PAUSE = 0.2  # seconds between two looks at what has changed
GATHER = 0.05  # of the last batch's time: as long may the next note come later, and still be in a batch


class Waiting:
    """The notes that wait, as (turn, number, note, future of the result). Requests take turns, note by note:
    none waits for all notes of another."""

    def __init__(self):
        self.queue = PriorityQueue()
        self.numbers = itertools.count()
        self.turn = 0  # of the note that was taken last
        self.patience = 0.0  # seconds to wait for one more note of a batch

    def add(self, notes: Sequence[str]) -> list[Future]:
        """The futures of their results. Raises HTTPException if too many notes wait."""
        if self.queue.qsize() + len(notes) > MOST_WAITING:
            raise HTTPException(503, "too many notes are waiting; try again later", RETRY)
        entries = [(self.turn + i, next(self.numbers), note, Future()) for i, note in enumerate(notes)]
        for entry in entries:
            self.queue.put(entry)
        return [future for *_, future in entries]

    def take(self, most: int) -> dict[int, tuple[str, Future]]:
        """(note, future) by number, at most so many, of clients that are still there; {} after a PAUSE."""
        taken = {}
        with suppress(Empty):
            while len(taken) < most:
                turn, number, note, future = self.queue.get(timeout=self.patience if taken else PAUSE)
                if future.set_running_or_notify_cancel():
                    taken[number] = (note, future)
                    self.turn = turn
        return taken


def write_together(taken: dict[int, tuple[str, Future]], summarize: Callable) -> None:
    """Gives each note's future its result, or the failure of all, which does not end the server."""
    try:
        for number, result in summarize({number: note for number, (note, _) in taken.items()}):
            taken.pop(number)[1].set_result(result)
    except Exception as error:
        for _, future in taken.values():
            future.set_exception(error)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Notes(Body):
    note: str | None = None
    notes: list[str] | None = Field(None, min_length=1, max_length=MOST_NOTES)


class Message(Body):
    role: Literal["user", "assistant"]  # the instruction is that of training
    content: str


class Chat(Body):
    model: Literal["specialist"] = MODEL
    messages: list[Message] = Field(min_length=1)
    stream: Literal[False] = False


async def read(request: Request, kind: type[Body], form: str) -> Body:
    """The body of a request. Raises HTTPException that says where it is wrong, without its text."""
    try:
        async with request.app.state.bodies, asyncio.timeout(BODY_SECONDS):
            body = await request.body()
        return kind.model_validate_json(body)
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {BODY_SECONDS} seconds") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False)[0]
        place = ".".join(safe_id(str(part)) for part in first["loc"]) or "body"
        # Where a note was pasted into a command line
        hint = r"; inside a text a line break is \n, a quote \"" if first["type"] == "json_invalid" else ""
        raise HTTPException(422, f"{place}: {first['msg']}{hint}; {form}") from None
    except ClientDisconnect:
        raise HTTPException(400, GONE) from None


def check_headers(request: Request, token: bytes) -> None:
    """Raises HTTPException for a request whose body is not to be read. A page on the web can let its own name
    point to this machine, and send what is not JSON unasked."""
    headers = request.headers
    if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", headers.get("host", "")):
        raise HTTPException(403, "the Host header must be localhost or 127.0.0.1")
    given = headers.get("authorization", "").encode("latin-1")
    if token and not hmac.compare_digest(given, b"Bearer " + token):
        problem = "send the header Authorization: Bearer TOKEN, with this server's token"
        raise HTTPException(401, problem, {"WWW-Authenticate": "Bearer"})
    if request.method != "POST":
        return
    if not re.fullmatch(r"application/json\s*(;.*)?", headers.get("content-type", "")):
        raise HTTPException(415, "send the header Content-Type: application/json")
    if "transfer-encoding" in headers or "content-length" not in headers:
        raise HTTPException(411, "send the body whole, with the header Content-Length")
    if int(headers["content-length"]) > LARGEST_BODY:
        raise HTTPException(413, f"the body has more than {LARGEST_BODY:,} bytes; send fewer notes at a time")


def make_app(waiting: Waiting, token: bytes) -> FastAPI:
    async def check(request: Request) -> None:
        check_headers(request, token)

    app = FastAPI(
        dependencies=[Depends(check)], docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.bodies = asyncio.Semaphore(MOST_BODIES)

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> JSONResponse:
        routes = f"; there is {ROUTES}" if error.status_code in (404, 405) else ""
        return JSONResponse({"error": {"message": error.detail + routes}}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        # Others' messages may quote a note
        frames = "".join(traceback.format_tb(error.__traceback__))
        log(f"error: {error.problem if isinstance(error, RunError) else type(error).__name__ + frames}")
        return JSONResponse({"error": {"message": "the server failed; its log says where"}}, 500)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "waiting": waiting.queue.qsize()}

    @app.get("/v1/models")
    async def models() -> dict:
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [model]}

    @app.post("/summaries")
    async def summaries(request: Request) -> JSONResponse:
        asked = await read(request, Notes, NOTES_FORM)
        if (asked.note is None) == (asked.notes is None):
            raise HTTPException(422, f"body: note or notes, one of them; {NOTES_FORM}")
        notes = [asked.note] if asked.notes is None else asked.notes
        return JSONResponse({"summaries": await results_of(notes, waiting, request)})

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> JSONResponse:
        last = (await read(request, Chat, CHAT_FORM)).messages[-1]
        if last.role != "user":
            raise HTTPException(422, f"messages: the last one is not the user's; {CHAT_FORM}")
        [result] = await results_of([last.content], waiting, request)
        if problem := result.get("error"):
            raise HTTPException(500, f"{problem}; {FIXES.get(problem, 'try another note')}")
        return JSONResponse(completion(result))

    return app


async def results_of(notes: Sequence[str], waiting: Waiting, request: Request) -> list[dict]:
    """Their results, in their order. Notes that still wait when the client hangs up are dropped."""
    for i, note in enumerate(notes):
        if problem := note_problem(note):
            raise HTTPException(422, f"{problem} (number {i + 1} of {len(notes)}); send a note with text")
    results = asyncio.gather(*map(asyncio.wrap_future, waiting.add(notes)))
    while not (await asyncio.wait([results], timeout=PAUSE))[0]:
        if await request.is_disconnected():
            results.cancel()
            with suppress(asyncio.CancelledError):
                await results
            raise HTTPException(400, GONE)
    return results.result()


def completion(result: dict) -> dict:
    """A result in the form of OpenAI's chat completions, and whole as `result`."""
    counts = (result["n_prompt_tokens"], result["n_new_tokens"])
    message = {"role": "assistant", "content": result["generated_summary"]}
    reason = "stop" if result["finish_reason"] == "stop" else "length"
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*counts, sum(counts)))),
        "result": result,
    }


def listen(port: int) -> socket.socket:
    """A socket of this machine alone. Raises InputError if the port cannot be had."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        fix = "choose another one, or end the program that has it"
        raise InputError(f"--serve {port}: the port cannot be used ({error.strerror})", fix) from None


def read_token(file: str | None) -> bytes:
    """The one word in a file; b"" without a file. Raises InputError for other content: an empty token would
    let everybody in."""
    words = Path(file).read_bytes().split() if file else [b""]
    if len(words) != 1:
        raise InputError(
            f"--serve_token_file {file}: not one word", "write the token to it, and nothing else"
        )
    return words[0]


def serve(summarize: Callable, batch_size: int, listener: socket.socket, token: bytes) -> None:
    """Answers requests until a signal comes: `summarize` takes notes by number, `batch_size` at most, and
    yields (number, result) as summaries end. Raises Stopped; what was being written is answered before, what
    was waiting is refused."""
    waiting = Waiting()
    # uvicorn's own log would name what was asked for
    quiet = {"log_config": None, "log_level": "critical", "access_log": False}
    app = make_app(waiting, token)
    config = uvicorn.Config(app, http="h11", ws="none", timeout_graceful_shutdown=5, **quiet)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    with noted_signals("finishing the summaries that are being written") as noted:
        thread.start()
        log(f"Serving on http://127.0.0.1:{listener.getsockname()[1]} (Ctrl-C stops): {ROUTES}")
        while thread.is_alive() and not noted:
            if taken := waiting.take(batch_size):
                started = time.monotonic()
                write_together(taken, summarize)
                # Clients that have just been answered come back together
                waiting.patience = min(PAUSE, GATHER * (time.monotonic() - started))
        server.should_exit = True
        while thread.is_alive():
            for _, future in waiting.take(MOST_WAITING).values():
                future.set_exception(HTTPException(503, "the server is stopping; try again later", RETRY))
    if not noted:
        raise RunError("the server has ended by itself", "start it again")
    raise Stopped(noted[0], "stopped: the summaries that had been begun are answered")
