"""No byte that a run writes, logs or pushes holds a token of the user's."""

import multiprocessing

import pytest
from hub.loopback_hub import WRITER
from hub.secret_script import KEY, NESTED, Config, tell_token

from hf_wash.secret_options import is_secret


SECRETS = [secret.encode() for secret in (WRITER, NESTED, KEY)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("secrets")


@pytest.fixture(scope="module")
def printed(hub, fresh_process, place):
    # The token is among the options alone, so that a run that lost it could not push.
    completed = fresh_process("secret_script.py", place, token="hf_nobody")[0]
    return completed.stdout + completed.stderr


@pytest.mark.parametrize("kind", ["vit", "any"])
def test_nothing_that_is_written_holds_a_secret(printed, place, kind):
    files = [path for path in (place / f"run-{kind}").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"training_args.bin", "population.json", "wash_run.json", "README.md", "optimizer.pt", "shown.txt"} <= names
    assert len([path for path in files if path.name == "training_args.bin"]) >= 3
    assert not [(path, secret) for path in files for secret in SECRETS if secret in path.read_bytes()]


@pytest.mark.parametrize("kind", ["vit", "any"])
def test_nothing_that_is_pushed_holds_a_secret(printed, hub, kind):
    repository = hub.repositories[f"user/{kind}"]
    assert len(repository.messages) >= 4
    pushed = [(path, hub.blobs[oid]) for tree in repository.trees.values() for path, oid in tree.items()]
    assert {"training_args.bin", "checkpoint-2/training_args.bin", "members/member_1/config.json"} <= {
        p for p, _ in pushed
    }
    assert not [(path, secret) for path, content in pushed for secret in SECRETS if secret in content]


def test_nothing_that_is_logged_holds_a_secret(printed):
    assert "hub_token=<HUB_TOKEN>" in printed and "eos_token" in printed
    assert not [secret for secret in SECRETS if secret.decode() in printed]


def test_a_process_that_is_started_with_the_options_has_the_token(tmp_path):
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=tell_token, args=(Config(str(tmp_path), use_cpu=True, hub_token=WRITER), answer))
    process.start()
    try:
        assert answer.get(timeout=60) == WRITER
    finally:
        process.join(30)


@pytest.mark.parametrize(
    "name", ["hub_token", "token", "use_auth_token", "wandb_api_key", "password", "client_secret"]
)
def test_what_is_a_secret_is_told_by_its_name(name):
    assert is_secret(name, "x") and not is_secret(name, True) and not is_secret(name, None)


@pytest.mark.parametrize("name", ["eos_token", "pad_token", "length_column_name", "max_tokens", "monkey"])
def test_what_is_none_is_kept(name):
    assert not is_secret(name, "x")
