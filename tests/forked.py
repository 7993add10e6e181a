"""Python programs in forked children of one process that has imported the libraries already, so that each
starts in milliseconds.

    python tests/forked.py SOCKET       # serves; the root of the repository to run is the working folder

`write_shim` writes a stand-in for `python` that asks the server on SOCKET. The program gets the caller's
arguments, folder, environment and streams, and ends with its own exit status. With PARSE_ONLY=1 in the
environment it ends, successfully, once its options are parsed."""

import argparse
import atexit
import gc
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path

LIBRARIES = (
    "accelerate matplotlib.figure matplotlib.backends.backend_agg pandas peft rouge_score.rouge_scorer "
    "torch.utils.data transformers.models.auto transformers.models.llama.modeling_llama "
    "transformers.generation.utils transformers.integrations.peft"
)
SHIM = """#!{python} -ISE
import json, os, socket, sys
client = socket.socket(socket.AF_UNIX)
client.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(client, [len(request).to_bytes(4, "big")], [0, 1, 2])
client.sendall(request)
answer = client.recv(1)
sys.exit(answer[0] if answer else 1)
"""


def write_shim(path: Path, address: Path) -> None:
    path.write_text(SHIM.format(python=sys.executable, address=str(address)))
    path.chmod(0o755)


def read_request(client: socket.socket) -> tuple[list[str], str, dict, list[int]]:
    """(arguments, folder, environment, file descriptors of the three streams)"""
    size, streams, _, _ = socket.recv_fds(client, 4, 3)
    with client.makefile("rb") as file:
        arguments, folder, environment = json.loads(file.read(int.from_bytes(size, "big")))
    return arguments, folder, environment, streams


def only_parse() -> None:
    """From now on a program ends when it has parsed its options."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_end(*arguments, **options):
        unknown = parse(*arguments, **options)[1]
        sys.exit(f"error: unknown options: {unknown}" if unknown else 0)

    argparse.ArgumentParser.parse_known_args = parse_and_end


def run_program(arguments: list[str]) -> None:
    first, *rest = arguments
    if first in ("-c", "-m"):
        sys.argv = [first, *rest[1:]]
        sys.path[0] = os.getcwd()
    if first == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


def run_and_exit(arguments: list[str]) -> None:
    """Ends the process as Python would, but without tidying up, which takes longer than most programs."""
    from sft.cli import Progress

    sys.executable = shutil.which("python")  # what the program starts is forked too
    # Lines of progress that else come every 30 seconds
    Progress.__init__.__kwdefaults__["interval"] = -1
    if os.environ.get("PARSE_ONLY"):
        only_parse()
    status = 0
    try:
        run_program(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def serve(address: str) -> list[str]:
    """Forks for each caller. Returns in the child that is to run the program, with its arguments."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    while True:
        client, _ = server.accept()
        arguments, folder, environment, streams = read_request(client)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the child that waits
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            program = os.fork()
            if program == 0:
                break
            status = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
            client.sendall(bytes([status % 256]))
            os._exit(0)
        client.close()
        for stream in streams:
            os.close(stream)
    server.close()
    client.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return arguments


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    import importlib

    import sft_evaluation  # noqa: F401
    import sft_inference  # noqa: F401
    import stage_a_sft_training  # noqa: F401

    for name in LIBRARIES.split():
        importlib.import_module(name)
    for file in Path("sft").rglob("*.py"):
        importlib.import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
    gc.freeze()  # or the children would copy all memory to collect it
    run_and_exit(serve(sys.argv[1]))
