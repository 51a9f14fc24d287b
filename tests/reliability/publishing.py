"""A Hub that is not there, refuses, breaks off or is full at any call; and cards that somebody else wrote, in any shape."""

import errno
import types

import httpx
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from reliability.harness import Act, Situation, refused, stopped, unharmed, warned
from reliability.tiny import SAVING, On, outcome, trainer


# ---- The Hub --------------------------------------------------------------------------------------------------------


def _answer(status: int, text: str) -> HfHubHTTPError:
    request = httpx.Request("POST", "https://hub.invalid/api")
    return HfHubHTTPError(text, response=httpx.Response(status, request=request, text=text), server_message=text)


FAILURES = {
    "no network": (lambda: httpx.ConnectError("Name or service not known"), "Name or service not known"),
    "a time-out": (lambda: httpx.ReadTimeout("timed out"), "timed out"),
    "a connection that breaks off": (lambda: httpx.RemoteProtocolError("Server disconnected"), "Server disconnected"),
    "a token that is none": (lambda: _answer(401, "Invalid username or password."), "401"),
    "a token that may not write": (lambda: _answer(403, "Forbidden"), "403"),
    "nothing found": (lambda: _answer(404, "Repository not found"), "404"),
    "too many requests": (lambda: _answer(429, "Too many requests"), "429"),
    "a broken server": (lambda: _answer(500, "Internal error"), "500"),
    "a full disk": (lambda: OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    "an answer that is no JSON": (lambda: ValueError("Expecting value: line 1"), "Expecting value"),
}
# In two parts, since a traceback shows lines of this file.
TOKEN = "hf_" + "secretsecret"
CALLS = ("create_repo", "create_branch", "list_repo_files", "create_commit")


def hub(failing: str | None, error=None, number: int = 1):
    """The client's calls answer as a Hub that takes everything, but for the k-th of one."""
    counts = dict.fromkeys(CALLS, 0)
    answers = {
        "create_repo": lambda *args, **kwargs: types.SimpleNamespace(repo_id="user/run", repo_url="hub"),
        "create_branch": lambda *args, **kwargs: None,
        "list_repo_files": lambda *args, **kwargs: ["members/member_7/config.json"],
        "create_commit": lambda *args, **kwargs: types.SimpleNamespace(oid="0" * 40, repo_url="hub"),
    }

    def make(name):
        def call(self, *args, **kwargs):
            counts[name] += 1
            if name == failing and counts[name] >= number:
                raise error()
            return answers[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(huggingface_hub.HfApi, name, make(name))


def pushing(failing, error, number=1, **changes):
    """A run that pushes each checkpoint, and its result at the end."""

    def do(place):
        hub(failing, error, number)
        run = trainer(place, **SAVING, push_to_hub=True, hub_model_id="user/run", hub_token=TOKEN,
                      hub_strategy="every_save", hub_always_push=True,
                      given={"callbacks": [On("step_begin", lambda state, control: run._finish_current_push())]}, **changes)  # fmt: skip
        run.train()
        result = outcome(run)
        run.save_model()
        run.save_members()
        try:
            run.push_to_hub()
        finally:
            (place.folder / "done").write_text(str(result))
            assert (place.run / "model.safetensors").is_file() and (place.run / "_members").is_dir()
        return result

    return do


def whole(place, result):
    """All was trained and saved, whatever the Hub said."""
    if not (place / "done").is_file():
        return "the training was lost"
    return None


def pushed_later(failing, error, **changes):
    """A folder that was trained before."""

    def do(place):
        from hf_wash.hub.push import push_folder

        hub(failing, error)
        push_folder(place.run, "user/run", token=TOKEN, **changes)

    return do


def not_pushed(make):
    """A folder that cannot be pushed."""

    def do(place):
        from reliability.harness import prepared

        from hf_wash.hub.push import push_folder

        hub("create_repo", lambda: AssertionError("the Hub was asked"))
        make(place.run)
        prepared(place)
        push_folder(place.run, "user/run", members=True)

    return do


def _unlink(*names):
    def make(run):
        for name in names:
            (run / name).unlink()

    return make


def _remove(name):
    import shutil

    return lambda run: shutil.rmtree(run / name)


SECRET = {"silent_about": (TOKEN,)}
HUB = "a failing Hub"


def hub_situations():
    for what, (error, said) in FAILURES.items():
        # Before training, so that nobody trains for a Hub that does not take it.
        yield Situation(HUB, f"create_repo: {what}", (Act(pushing("create_repo", error), refused(said, **SECRET)),))
        # While training: the run goes on; at its end the push says what to do.
        yield Situation(
            HUB, f"create_commit, from the first on: {what}",
            (Act(pushing("create_commit", error), stopped(said, "hf-wash push", error="PushError", check=whole, **SECRET)),),
        )  # fmt: skip
        yield Situation(
            HUB, f"a push of a folder, create_commit: {what}",
            (Act(pushed_later("create_commit", error), stopped(said, "hf-wash push", "Nothing in the folder is lost", error="PushError", **SECRET)),),
            template="finished",
        )  # fmt: skip
    for call in ("create_repo", "create_branch", "list_repo_files"):
        for what in ("no network", "a token that is none", "a broken server"):
            error, said = FAILURES[what]
            yield Situation(
                HUB, f"a push of a folder, {call}: {what}",
                (Act(pushed_later(call, error, members=True, revision="dev"), stopped(said, "hf-wash push", error="PushError", **SECRET)),),
                template="finished",
            )  # fmt: skip
    for number in (2, 3):
        error, said = FAILURES["a connection that breaks off"]
        yield Situation(
            HUB, f"create_commit, from the {('second', 'third')[number - 2]} on",
            (Act(pushing("create_commit", error, number), stopped(said, error="PushError", check=whole)),),
        )  # fmt: skip
    yield Situation(
        HUB,
        "a branch that cannot be made",
        (Act(pushing("create_branch", FAILURES["nothing found"][0], hub_revision="dev"), refused("404")),),
    )
    yield Situation(HUB, "none fails", (Act(pushing(None, None), unharmed(like="undisturbed")),))
    yield Situation(
        HUB, "two processes, create_repo fails",
        (Act(pushing("create_repo", FAILURES["no network"][0]), refused("Name or service not known", error="Exception")),), 2,
    )  # fmt: skip
    offline = Act(lambda place: trainer(place, push_to_hub=True, hub_model_id="user/run") and None, refused("offline"))
    yield Situation(HUB, "offline", (offline,))
    yield Situation(
        HUB, "two processes, offline",
        (Act(offline.do, refused("offline", error="Exception")),), 2,
    )  # fmt: skip
    for name, make, said in (
        ("no weights", _unlink("model.safetensors"), "no weights"),
        ("no members", _remove("_members"), "no members"),
        ("a member too few", _remove("_members/member_1"), "member_1 is missing"),
        ("a member without weights", _unlink("_members/member_1/model.safetensors"), "no weights"),
        ("a record that is no JSON", lambda run: (run / "wash_run.json").write_text("{"), "wash_run.json"),
        ("a record that is a list", lambda run: (run / "wash_run.json").write_text("[]"), "wash_run.json"),
    ):
        yield Situation(HUB, f"a folder with {name}", (Act(not_pushed(make), refused(said)),), template="finished")


# ---- Cards ----------------------------------------------------------------------------------------------------------

FRONT = "---\nlicense: mit\n---\n"
CARDS: dict[str, tuple[str | bytes, bool]] = {
    # What stands in the card, and whether its metadata can be added to.
    "empty": ("", True),
    "blanks": (" \n\n ", True),
    "text alone": ("# Mine\n", True),
    "front matter alone": (FRONT, True),
    "front matter and text": (f"{FRONT}# Mine\n", True),
    "Windows' line ends": ("---\r\nlicense: mit\r\n---\r\n# Mine\r\n", True),
    "a mark of bytes": ("\ufeff---\nlicense: mit\n---\n# Mine\n", True),
    "no line end at its end": ("# Mine", True),
    "empty front matter": ("---\n---\n# Mine\n", True),
    "front matter that never ends": ("---\nlicense: mit\n# Mine\n", False),
    "a list left open": ("---\nlicense: [mit\n---\n# Mine\n", False),
    "a tab": ("---\n\tlicense: mit\n---\n# Mine\n", False),
    "an anchor of nothing": ("---\nlicense: *nowhere\n---\n# Mine\n", False),
    "a tag that runs code": ("---\nlicense: !!python/object/apply:os.mkdir [exploded]\n---\n# Mine\n", False),
    "a list for front matter": ("---\n- a\n- b\n---\n# Mine\n", False),
    "a text for front matter": ("---\njust words\n---\n# Mine\n", False),
    "a number for front matter": ("---\n3\n---\n# Mine\n", False),
    "braces for front matter": ("---\n{license: mit}\n---\n# Mine\n", False),
    "two documents": ("---\nlicense: mit\n...\ntags: [a]\n---\n# Mine\n", False),
    "a key twice": ("---\nlicense: mit\nlicense: apache-2.0\n---\n# Mine\n", True),
    "numbers for keys": ("---\n1: a\n2: b\n---\n# Mine\n", True),
    "null for values": ("---\nlicense:\ntags:\n---\n# Mine\n", True),
    "tags that are a number": ("---\ntags: 3\n---\n# Mine\n", True),
    "a model index that is a text": ("---\nmodel-index: mine\n---\n# Mine\n", True),
    "a license that is a dictionary": ("---\nlicense: {a: 1}\n---\n# Mine\n", True),
    "an anchor and its reference": ("---\nbase: &b mit\nlicense: *b\n---\n# Mine\n", True),
    "comments": ("---\n# why\nlicense: mit  # since\n---\n# Mine\n", True),
    "a text of several lines": ("---\nlicense: mit\nnote: |\n  one\n  two\n---\n# Mine\n", True),
    "a date": ("---\ndate: 2024-01-01\n---\n# Mine\n", True),
    "three dashes in the text": (f"{FRONT}a\n---\nb\n---\n", True),
    "ten thousand lines": (FRONT + "line\n" * 10_000, True),
    "deep nesting": ("---\na: " + "[" * 400 + "]" * 400 + "\n---\n# Mine\n", True),
    "a bomb of references": ("---\na: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)) + "---\n# Mine\n", True),
    "control characters": ("---\nlicense: mit\n---\n# Mi\x07ne\x1b[31m\n", True),
    "a NUL": ("---\nlicense: mit\n---\n# Mi\0ne\n", True),
    "a NUL in front matter": ("---\nlicense: m\0it\n---\n# Mine\n", False),
    "bytes that are no text": (b"---\nlicense: mit\n---\n# Mine \xff\xfe\n", False),
    "another encoding": ("# Läufchen\n".encode("utf-16"), False),
    "a mark without its end": (f'{FRONT}<!-- hf-wash:begin {{}} x -->\n# Mine\n', False),
    "an end without its mark": (f"{FRONT}# Mine\n<!-- hf-wash:end -->\n", True),
    "a mark that is no JSON": (f"{FRONT}<!-- hf-wash:begin {{a}} x -->\nold\n<!-- hf-wash:end -->\n# Mine\n", True),
    "a mark of deep nesting": (f"{FRONT}<!-- hf-wash:begin {{\"a\": {'[' * 3000}{']' * 3000}}} x -->\nold\n<!-- hf-wash:end -->\n# Mine\n", True),
    "a mark of numbers": (f'{FRONT}<!-- hf-wash:begin {{"license": 3}} x -->\nold\n<!-- hf-wash:end -->\n# Mine\n', True),
    "two marks": (f"{FRONT}<!-- hf-wash:begin {{}} x -->\na\n<!-- hf-wash:end -->\n# Mine\n<!-- hf-wash:begin {{}} x -->\nb\n<!-- hf-wash:end -->\n", True),
    "a jinja template": (f"{FRONT}# Mine {{{{ 7 * 7 }}}} {{% for x in y %}}\n", True),
    "a backslash and a group": (f"{FRONT}# Mine \\1 \\g<0>\n", True),
}  # fmt: skip


def card(content):
    """Write the card of a run over one of somebody else's, as the Trainer does."""

    def do(place):
        from hf_wash.hub.card import write_card

        existing = content if isinstance(content, bytes) else content.encode()
        (place.run / "README.md").write_bytes(existing)
        (place.folder / "mine").write_bytes(existing)
        write_card(place.run)
        write_card(place.run)  # what was written once is found again

    return do


def mine_is_kept(place, result):
    import re

    mine = (place / "mine").read_bytes()
    card = (place / "run" / "README.md").read_bytes()
    if list(place.rglob("exploded")):
        return "the card ran code"
    own = re.sub(rb"<!-- hf-wash:begin .*?<!-- hf-wash:end -->", b"", mine, flags=re.DOTALL)
    gone = [line for line in own.split(b"\n") if line.strip() and line.rstrip(b"\r") not in card]
    return f"of what was there {gone[:2]} is lost" if gone else None


def link(place):
    """A card that is a link to somebody's file elsewhere."""
    from hf_wash.hub.card import write_card

    (place.folder / "elsewhere.md").write_text("mine")
    (place.run / "README.md").unlink()
    (place.run / "README.md").symlink_to("../elsewhere.md")
    write_card(place.run)


KIND = "cards of somebody else's"
SITUATIONS = [
    *hub_situations(),
    *(
        Situation(
            KIND, name, (Act(card(content), (unharmed if added else warned)(check=mine_is_kept)),), template="finished",
            may_change=("run/README.md",),
        )
        for name, (content, added) in CARDS.items()
    ),
    Situation(KIND, "a link", (Act(link, unharmed()),), template="finished", may_change=("run/README.md", "elsewhere.md")),
]  # fmt: skip
