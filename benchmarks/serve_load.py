"""How fast is the server under load, against a file of the same notes?

    python benchmarks/serve_load.py [--model_path FOLDER] [--requests 100] [--clients 8] [OPTION ...]

Further options go to sft_inference.py both times, as `--writing free --max_new_tokens 40`. Each round writes
the file (its own figure, without loading), then asks for the notes one by one, so many at a time; as many
summaries are written together in both. Prints a Markdown table; "same text" counts the answers that are the
file's summaries to the letter."""

import argparse
import csv
import http.client
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTES = ROOT / "phase1_data" / "sft" / "train_set_processed.csv"


def ask(port: int, note: str | None = None) -> dict:
    """The answer about a note; about the server's health without one. OSError while it is not there."""
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        if note is None:
            connection.request("GET", "/health")
        else:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/summaries", json.dumps({"note": note}), headers)
        return json.loads(connection.getresponse().read())


def write_file(command: list[str], notes: list[str], folder: Path) -> tuple[float, list[str]]:
    """(notes per second, summaries) of a file."""
    with open(folder / "notes.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["clinical_note"], *([note] for note in notes)])
    out = folder / "summaries.jsonl"
    out.unlink(missing_ok=True)
    command = [*command, "--input_file", folder / "notes.csv", "--output_file", out]
    said = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
    results = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    rate = re.search(r"([\d.,]+) notes/s", said)[1]
    return float(rate.replace(",", "")), [result["generated_summary"] for result in results]


def ask_server(command: list[str], notes: list[str], n_clients: int) -> tuple[float, list[str]]:
    """The same of a server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([*command, "--serve", str(port)], stderr=subprocess.DEVNULL)
    try:
        while server.poll() is None:
            with suppress(OSError):
                ask(port)
                break
            time.sleep(0.2)
        started = time.perf_counter()
        with ThreadPoolExecutor(n_clients) as pool:
            answers = list(pool.map(lambda note: ask(port, note), notes))
        seconds = time.perf_counter() - started
    finally:
        server.terminate()
        server.wait()
    return len(notes) / seconds, [answer["summaries"][0]["generated_summary"] for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", default="models/sft_specialist/final_model")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    arguments, options = parser.parse_known_args()
    with open(NOTES, newline="", encoding="utf-8") as file:
        notes = list(dict.fromkeys(row["clinical_note"] for row in csv.DictReader(file)))
    notes = notes[: arguments.requests]
    command = [sys.executable, ROOT / "sft_inference.py", "--model_path", arguments.model_path, *options]
    command += ["--batch_size", str(arguments.clients)]
    print(f"{len(notes)} notes, {arguments.clients} at a time, {' '.join(options)}\n")
    print("| file, notes/s | server, notes/s | ratio | same text |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            file_rate, texts = write_file(command, notes, Path(folder))
            server_rate, answers = ask_server(command, notes, arguments.clients)
            n_same = sum(text == answer for text, answer in zip(texts, answers))
            ratio = server_rate / file_rate
            print(
                f"| {file_rate:.2f} | {server_rate:.2f} | {ratio:.2f} | {n_same}/{len(notes)} |", flush=True
            )


if __name__ == "__main__":
    main()
