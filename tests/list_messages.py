"""Prints every message and help text of the product code, with file and line, so that they can be read in one
sitting.

    python tests/list_messages.py

A line is FILE:LINE: KIND: TEXT. The kind is the call that the text is an argument of (InputError, log, ...),
or "text" if it is assigned, appended, returned or yielded first: a fix, a warning in a result, a reason. The
values in an f-string are shown as {…}. The --help of the scripts follows."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("sft_dataset.py", "stage_a_sft_training.py", "sft_inference.py", "sft_evaluation.py")
ERRORS = ("InputError", "RunError", "Stopped", "ArgumentTypeError", "_explain")
CALLS = (*ERRORS, "log", "print", "input", "failure", "parse_options")


def string(node: ast.AST) -> str | None:
    """The text of a string or an f-string; None for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(string(part) or "{…}" for part in node.values)
    return None


class Messages(ast.NodeVisitor):
    """Collects (line, kind, text) of a module's messages. Strings without a space count only as arguments of
    CALLS."""

    def __init__(self):
        self.found: list[tuple[int, str, str]] = []
        self.kind = "text"

    def visit(self, node: ast.AST) -> None:
        text = string(node)
        if text is None:
            super().visit(node)
            return
        if any(letter.isalpha() for letter in text) and (self.kind != "text" or " " in text.strip()):
            self.found.append((node.lineno, self.kind, text.replace("\n", "\\n")))
        # A value in an f-string may hold words too, as in f"{'is' if n == 1 else 'are'} known"
        for part in getattr(node, "values", ()):
            if isinstance(part, ast.FormattedValue):
                self.visit(part.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if string(node.value) is None:  # else a docstring
            self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)  # its key is no message

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        before = self.kind
        self.kind = name if name in CALLS else before
        self.generic_visit(node)
        self.kind = before


def main() -> None:
    for path in (*(ROOT / script for script in SCRIPTS), *sorted((ROOT / "sft").rglob("*.py"))):
        messages = Messages()
        messages.visit(ast.parse(path.read_text(encoding="utf-8")))
        for line, kind, text in messages.found:
            print(f"{path.relative_to(ROOT)}:{line}: {kind}: {text}")
    for script in SCRIPTS:
        print(f"\n$ python {script} --help", flush=True)
        subprocess.run([sys.executable, ROOT / script, "--help"], check=True)


if __name__ == "__main__":
    main()
