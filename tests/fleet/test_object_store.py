"""A root in an object store: in memory, and in a real S3 server with everything that can happen to it."""

import os
import random
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from lora_export.api.arguments import SILENT
from lora_export.errors import InputError, OutputError, RuntimeUnavailable, UnclearError
from lora_export.fleet.stores import attempts, bucket, opened
from lora_export.fleet.stores.bucket import Bucket, checked_url
from lora_export.fleet.stores.inputs import localized
from lora_export.fleet.stores.objects import ObjectStore
from lora_export.workflows.fleet.verifying import verify_root
from tests.fleet import s3, uploads
from tests.fleet.roots import PLACE, SIZES, made, record, writer_of

pytest.importorskip("obstore")
DEAD = "0" * 8


@pytest.fixture
def store() -> ObjectStore:
    return ObjectStore(f"memory://{secrets.token_hex(8)}")


# --- URLs and settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("hf://buckets/me/fleet", "files on the Hub"),
        ("https://example.org/fleet", "https:// is no store"),
        ("s3://key:secret@bucket/fleet", "a URL with a password"),
        ("s3://token@bucket/fleet", "a URL with a password"),
        ("az://container/fleet?sig=secret", "a URL with a password, a query"),
        ("s3://bucket/a/../b", "empty or special part"),
        ("s3://", "empty or special part"),
        ("gs://bucket//a", "empty or special part"),
    ],
)
def test_url_that_is_no_store_is_refused_without_its_secrets(url: str, found: str) -> None:
    with pytest.raises(InputError, match=found) as error:
        opened(url)
    assert "secret" not in str(error.value.as_json()) and "token@" not in str(error.value)


def test_url_is_spelled_in_one_way() -> None:
    assert checked_url("s3://bucket/fleet/") == checked_url("s3://bucket/fleet") == "s3://bucket/fleet"
    assert checked_url("abfss://container@account.dfs.core.windows.net/x").startswith("abfss://container@account")


def test_store_without_obstore_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(RuntimeUnavailable, match=re.escape("pip install 'lora-export[fleet]'")):
        opened("s3://bucket/fleet")


@pytest.mark.parametrize(
    ("url", "variables", "kind"),
    [
        ("gs://bucket/fleet", {}, "GCSStore"),
        (
            "az://container/fleet",
            {"AZURE_STORAGE_ACCOUNT_NAME": "me", "AZURE_STORAGE_ACCOUNT_KEY": "QUFB"},
            "AzureStore",
        ),
        ("s3://bucket/fleet", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "S3Store"),
    ],
)
def test_settings_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, url: str, variables: dict[str, str], kind: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    store = ObjectStore(url)
    assert type(store.bucket.store).__name__ == kind and store.where == url


def test_missing_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(InputError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        opened("az://container/fleet")


def told(text: str, kind: type[Exception] = Exception) -> tuple[str, bool]:
    error, answered = bucket._in_words(kind(text), "s3://bucket/fleet")
    assert "HUSH" not in str(error.as_json())
    return error.found, answered


@pytest.mark.parametrize(
    ("text", "found", "answered"),
    [
        ("status code: 403 Forbidden: <Code>InvalidAccessKeyId</Code><Id>HUSH", "refuses the credentials", True),
        ("status code: 401 Unauthorized: HUSH", "refuses the credentials", True),
        ("PUT http://169.254.169.254/latest/api/token: status code: 403", "there are no credentials", True),
        ("status code: 404 Not Found: <Code>NoSuchBucket</Code>", "no such bucket", True),
        ("status code: 507 Insufficient Storage", "the store is full", True),
        ("status code: 400 Bad: <Code>XMinioStorageFull</Code>", "the store is full", True),
        ("status code: 503 Slow: <Code>SlowDown</Code>", "too slow", False),
        ("HttpError { kind: Timeout, source: TimedOut }", "too slow", False),
        ("status code: 500 Internal Server Error", "the store fails", False),
        ("HTTP error: error sending request HUSH", "cannot be reached", False),
        ("status code: 400 Bad Request: HUSH", "refuses the request", True),
    ],
)  # fmt: skip
def test_errors_of_a_store_are_told_in_words(text: str, found: str, answered: bool) -> None:
    words, was_answered = told(text)
    assert found in words and was_answered == answered


# --- attempts ------------------------------------------------------------------------------------------------


def upload_of(store: ObjectStore, attempt: str) -> None:
    for name in SIZES:
        store.replace(f"{PLACE}/{attempt}/{name}", b"half")


def test_attempt_of_a_dead_process_is_removed_and_of_a_living_one_is_not(
    store: ObjectStore, tmp_path: Path
) -> None:
    mine = attempts.attempt_name()
    dead, elsewhere = f"{mine[:8]}-{DEAD}-{'0' * 16}", f"{DEAD}-{DEAD}-{'0' * 16}"
    for name in (dead, mine, elsewhere):
        upload_of(store, name)
    store.replace(f"{PLACE}/not-an-attempt/x", b"")
    assert store.publish(made(tmp_path / "1", "one"), PLACE, record("one"))
    left = {n.removeprefix(f"{PLACE}/").partition("/")[0] for n in store.names(PLACE)}
    assert dead not in left and {mine, elsewhere, "not-an-attempt"} <= left
    assert attempts.given_up(elsewhere, attempts.AGE + timedelta(seconds=1))
    assert not attempts.given_up("not-an-attempt", timedelta(days=9))


def test_attempt_names_a_process_that_lives_as_long_as_it(tmp_path: Path) -> None:
    code = "from lora_export.fleet.stores.attempts import attempt_name; print(attempt_name(), flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    name = child.stdout.readline().strip()
    assert attempts.is_attempt(name) and not attempts.given_up(name, timedelta())
    child.communicate("\n")
    assert attempts.given_up(name, timedelta())


def test_process_with_the_number_of_a_dead_one_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_PROC", tmp_path)
    (tmp_path / "42").mkdir()
    names = []
    for began in (100, 100, 101):
        fields = [str(i) for i in range(3, 53)]
        fields[19] = str(began)
        (tmp_path / "42/stat").write_text(f"42 (a name) with) {' '.join(fields)}")
        names.append(attempts._process(42))
    assert names[0] == names[1] != names[2]


class Wrapped:
    """A bucket of which `put_if` does something else the first times."""

    def __init__(self, inner: Bucket, *deeds: Callable[..., bool]) -> None:
        self.inner, self.deeds = inner, list(deeds)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def put_if(self, *given: object) -> bool:
        return (self.deeds.pop(0) if self.deeds else self.inner.put_if)(*given)  # type: ignore[arg-type]


SLOW = OutputError("the store is too slow")


def lost_answer(inner: Bucket) -> Callable[..., bool]:
    def put(*given: object) -> bool:
        inner.put_if(*given)  # type: ignore[arg-type]
        raise UnclearError(SLOW)

    return put


def sent_again(inner: Bucket) -> Callable[..., bool]:
    """The first request was carried out, its answer lost, and the second refused."""

    def put(*given: object) -> bool:
        assert inner.put_if(*given)  # type: ignore[arg-type]
        return inner.put_if(*given)  # type: ignore[arg-type]

    return put


def no_answer(*given: object) -> bool:
    raise UnclearError(SLOW)


def interrupted(inner: Bucket) -> Callable[..., bool]:
    def put(*given: object) -> bool:
        assert inner.put_if(*given)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    return put


def unread(inner: Bucket) -> Callable[..., bool]:
    """Carried out, sent again, refused, and the store does not say what is there."""

    def put(*given: object) -> bool:
        assert inner.put_if(*given)  # type: ignore[arg-type]
        raise OutputError("the store refuses the credentials")

    return put


@pytest.mark.parametrize("deed", [interrupted, unread])
def test_files_stay_where_an_error_comes_after_the_record(
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    deed: Callable[[Bucket], Callable[..., bool]],
) -> None:
    monkeypatch.setattr(store, "bucket", Wrapped(store.bucket, deed(store.bucket)))
    with pytest.raises((KeyboardInterrupt, OutputError)):
        store.publish(made(tmp_path / "1", "one"), PLACE, record("one"))
    assert writer_of(store, PLACE, tmp_path) == "one"


@pytest.mark.parametrize("deed", [lost_answer, sent_again])
def test_record_whose_answer_was_lost_is_known_as_ones_own(
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    deed: Callable[[Bucket], Callable[..., bool]],
) -> None:
    monkeypatch.setattr(store, "bucket", Wrapped(store.bucket, deed(store.bucket)))
    assert store.publish(made(tmp_path / "1", "one"), PLACE, record("one"))
    assert writer_of(store, PLACE, tmp_path) == "one"
    monkeypatch.setattr(store, "bucket", Wrapped(store.bucket, deed(store.bucket)))
    assert store.publish(made(tmp_path / "2", "two"), PLACE, record("two"), again=True)
    assert writer_of(store, PLACE, tmp_path) == "two"


def test_record_without_an_answer_is_sent_again(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "bucket", Wrapped(store.bucket, no_answer, no_answer))
    assert store.publish(made(tmp_path / "1", "one"), PLACE, record("one"))
    assert writer_of(store, PLACE, tmp_path) == "one"


def test_files_of_a_record_that_may_still_arrive_stay(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = store.bucket
    sent: list[tuple[object, ...]] = []

    def late(*given: object) -> bool:
        sent.append(given)
        raise UnclearError(SLOW)

    monkeypatch.setattr(store, "bucket", Wrapped(inner, late, late, late))
    source = made(tmp_path / "1", "one")
    with pytest.raises(OutputError, match="too slow"):
        store.publish(source, PLACE, record("one"))
    assert len(list(source.rglob("*.bin"))) == 1  # the caller has lost nothing
    assert inner.put_if(*sent[0])  # type: ignore[arg-type]
    assert writer_of(store, PLACE, tmp_path) == "one"


def test_object_that_is_replaced_while_it_is_fetched_comes_whole(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(made(tmp_path / "1", "one"), PLACE, record("one"))
    streamed, times = store._streamed, iter([True])

    def replacing(name: str, into: object) -> object:
        if next(times, False):
            store.publish(made(tmp_path / "2", "two"), PLACE, record("two"), again=True)
        return streamed(name, into)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_streamed", replacing)
    found = store.fetch(PLACE, tmp_path / "out")
    assert found is not None and found.outcome.worker == "two"


# --- inputs --------------------------------------------------------------------------------------------------


def adapter_at(url: str) -> ObjectStore:
    store = ObjectStore(url)
    store.replace("adapter_config.json", b"{}")
    store.replace("weights/adapter_model.safetensors", b"7" * 3000)
    return store


def test_remote_folder_comes_once_and_anew_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{secrets.token_hex(8)}/acme"
    store = adapter_at(url)
    first = localized(url, tmp_path)
    assert first.name == "acme" and (first / "weights/adapter_model.safetensors").read_bytes() == b"7" * 3000
    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "get", lambda *a: pytest.fail("asked again"))
        assert localized(f"{url}/", tmp_path) == first
    store.replace("adapter_config.json", b"[]")
    second = localized(url, tmp_path)
    assert second != first and (second / "adapter_config.json").read_bytes() == b"[]"
    (second / "adapter_config.json").unlink()  # a cache that somebody cleaned
    assert (localized(url, tmp_path) / "adapter_config.json").read_bytes() == b"[]"
    (second / "adapter_config.json").write_bytes(b"cut short, or longer")
    assert (localized(url, tmp_path) / "adapter_config.json").read_bytes() == b"[]"
    assert list((tmp_path / ".writing").iterdir()) == []


def test_remote_folder_that_several_want_is_whole(tmp_path: Path) -> None:
    url = f"memory://{secrets.token_hex(8)}/acme"
    adapter_at(url)
    with ThreadPoolExecutor(6) as pool:
        found = set(pool.map(lambda _: localized(url, tmp_path), range(12)))
    assert len(found) == 1 and len(list(found.pop().rglob("*.*"))) == 2


def test_remote_folder_with_odd_names_is_refused(tmp_path: Path) -> None:
    url = f"memory://{secrets.token_hex(8)}/acme"
    store = ObjectStore(url)
    with pytest.raises(InputError, match="there are no files"):
        localized(url, tmp_path)
    store.bucket.put("a\\b", b"1")
    with pytest.raises(InputError, match="cannot be a file"):
        localized(url, tmp_path)
    store.bucket.delete(["a\\b"])
    store.bucket.put("a", b"1")
    store.bucket.put("a/b", b"1")
    with pytest.raises(InputError, match="'a/b' cannot be a file"):
        localized(url, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_empty_files_that_stand_for_folders_are_left_out(tmp_path: Path) -> None:
    url = f"memory://{secrets.token_hex(8)}/acme"
    adapter_at(url).bucket.put("weights", b"")
    assert sorted(p.name for p in localized(url, tmp_path).iterdir()) == ["adapter_config.json", "weights"]


def test_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{secrets.token_hex(8)}/acme"
    store = adapter_at(url)
    files = list(store.bucket.files(""))
    store.replace("adapter_config.json", b"[]")
    monkeypatch.setattr(Bucket, "files", lambda *a: iter(files))
    with pytest.raises(InputError, match="changed while it was read"):
        localized(url, tmp_path)
    assert list((tmp_path / ".writing").iterdir()) == [] and len(list(tmp_path.iterdir())) == 1


def test_folder_of_a_bucket_of_the_hub_comes_through_its_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    class Hub:
        def list_bucket_tree(
            self, bucket: str, prefix: str, recursive: bool
        ) -> Iterator[huggingface_hub.BucketFile]:
            assert (bucket, prefix, recursive) == ("me/adapters", "team/acme", True)
            for path, size in (("team/acme/adapter_config.json", 2), ("team/acme/w/a.bin", 3), ("team/acme2/x", 1)):
                yield huggingface_hub.BucketFile(type="file", path=path, size=size, xetHash=f"h{size}")

        def download_bucket_files(self, bucket: str, files: list[tuple[object, Path]], **given: object) -> None:
            for file, target in files:
                Path(target).write_bytes(b"x" * file.size)  # type: ignore[attr-defined]

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    found = localized("hf://buckets/me/adapters/team/acme", tmp_path)
    assert sorted(p.relative_to(found).as_posix() for p in found.rglob("*.*")) == ["adapter_config.json", "w/a.bin"]
    for url in ("hf://me/model", "hf://buckets/me/adapters", "hf://buckets/me/adapters/../x"):
        with pytest.raises(InputError, match="of the Hub"):
            localized(url, tmp_path)


# --- a real S3 server ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.served(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def root(server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> str:
    s3.speak_to(monkeypatch, server.url)
    return f"s3://{s3.BUCKET}/{secrets.token_hex(8)}"


@pytest.fixture
def proxy(server: s3.Server, root: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Proxy]:
    with s3.proxied(server) as proxy:
        s3.speak_to(monkeypatch, proxy.url)
        monkeypatch.setattr(bucket, "SILENCE_SECONDS", 1.0)
        monkeypatch.setattr(bucket, "RETRIES", 2)
        yield proxy


LARGE = {**SIZES, "onnx/model.onnx.data": 20_000_000}


@pytest.mark.slow
def test_s3_keeps_an_object_as_it_was(root: str, server: s3.Server, tmp_path: Path) -> None:
    store = opened(root)
    assert store.publish(made(tmp_path / "1", "one", LARGE), PLACE, record("one"))
    assert not store.publish(made(tmp_path / "2", "two", LARGE), PLACE, record("two"))
    assert writer_of(store, PLACE, tmp_path, LARGE) == "one"
    assert store.publish(made(tmp_path / "3", "three"), PLACE, record("three"), again=True)
    assert writer_of(store, PLACE, tmp_path) == "three"
    assert len(list(store.names(""))) == len(SIZES) + 1 and server.uploads() == 0
    assert store.create("a.json", b"1") and not store.create("a.json", b"2") and store.read("a.json") == b"1"
    store.remove(PLACE)
    assert list(store.names("")) == ["a.json"]


@pytest.mark.slow
def test_s3_with_many_writers_keeps_one_whole_object(root: str, tmp_path: Path) -> None:
    store = opened(root)
    for turn in range(5):
        place = f"objects/{turn}"
        folders = [made(tmp_path / f"{turn}-{w}", str(w)) for w in range(6)]
        with ThreadPoolExecutor(6) as pool:
            tried = [pool.submit(opened(root).publish, f, place, record(str(w))) for w, f in enumerate(folders)]
        won = [one.result() for one in tried]
        assert sum(won) == 1 and writer_of(store, place, tmp_path) == str(won.index(True))
        assert len(list(store.names(place))) == len(SIZES) + 1


@pytest.mark.slow
def test_s3_records_of_many_objects_come_in_a_listing_and_a_request_each(root: str, proxy: s3.Proxy) -> None:
    store = opened(root)
    keys = [f"{i:064x}" for i in range(250)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda k: store.replace(f"objects/{k}/record.json", k.encode()), keys))
    proxy.seen.clear()
    assert store.records("objects") == {k: k.encode() for k in keys}
    assert len(proxy.seen) <= 250 + 2


def refusing(status: int, passing: int) -> s3.Rule:
    """Every request that writes, after the first ones."""
    return lambda count, method, path: status if count > passing and method in ("PUT", "POST") else None


@pytest.mark.slow
@pytest.mark.parametrize("status", [403, 507])
def test_s3_that_refuses_in_the_middle_is_told_and_the_next_run_goes_on(
    root: str, proxy: s3.Proxy, server: s3.Server, tmp_path: Path, status: int
) -> None:
    words = {403: "refuses the credentials", 507: "the store is full"}[status]
    store, source = opened(root), made(tmp_path / "1", "one", LARGE)
    for passing in (0, 1, 3, 6, 8):
        proxy.seen.clear()
        proxy.rule = refusing(status, passing)
        with pytest.raises(OutputError, match=words) as error:
            store.publish(source, PLACE, record("one"))
        assert f"({status}" in str(error.value) and "it goes on" in str(error.value)
        for secret in (s3.KEY_ID, s3.SECRET):
            assert secret not in str(error.value.as_json())
        assert store.fetch(PLACE, tmp_path / "out") is None
        assert server.uploads() == 0
    assert any("?delete" in path for _, path in proxy.seen)  # which is refused as well
    proxy.rule = lambda count, method, path: None
    assert store.publish(source, PLACE, record("one")) and writer_of(store, PLACE, tmp_path, LARGE) == "one"
    assert len(list(store.names(""))) == len(LARGE) + 1


@pytest.mark.slow
@pytest.mark.parametrize("deed", [500, 503, "hang", "cut", "lost"])
def test_s3_that_fails_now_and_then_is_asked_again(
    root: str, proxy: s3.Proxy, server: s3.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: str | int
) -> None:
    monkeypatch.setattr(bucket, "RETRIES", 6)
    chance = random.Random(3)
    failing = {count for count in range(1, 2000) if chance.random() < 0.15}
    proxy.hang = 1.5
    proxy.rule = lambda count, method, path: deed if count in failing else None
    store = opened(root)
    for turn in range(6):
        place, source = f"objects/{turn}", made(tmp_path / str(turn), "one", LARGE if turn == 0 else SIZES)
        for _ in range(4):  # a run that goes on
            try:
                store.publish(source, place, record("one"))
                break
            except OutputError:
                assert source.is_dir()
        assert writer_of(store, place, tmp_path, LARGE if turn == 0 else SIZES) == "one"
    assert any(count in failing for count in range(len(proxy.seen)))


@pytest.mark.slow
def test_s3_that_does_not_know_conditions_is_refused(root: str, proxy: s3.Proxy, tmp_path: Path) -> None:
    proxy.rule = lambda count, method, path: "unconditional"
    source = made(tmp_path / "1", "one")
    for act in (
        lambda: opened(root).publish(source, PLACE, record("one")),
        lambda: opened(root).create("fleet.lock", b""),
    ):
        with pytest.raises(OutputError, match="If-None-Match"):
            act()
    assert opened(root).records("objects") == {} and source.is_dir()


@pytest.mark.slow
def test_s3_that_does_not_answer_is_told_in_time(root: str, proxy: s3.Proxy, tmp_path: Path) -> None:
    proxy.rule = lambda count, method, path: "hang"
    store, source = opened(root), made(tmp_path / "1", "one")
    with pytest.raises(OutputError, match="too slow"):
        store.publish(source, PLACE, record("one"))
    assert source.is_dir() and len(proxy.seen) <= 6
    proxy.rule = lambda count, method, path: "hang" if "record.json" in path and method == "PUT" else None
    with pytest.raises(OutputError, match="too slow"):
        store.publish(source, PLACE, record("one"))
    proxy.rule = lambda count, method, path: None
    assert store.publish(source, PLACE, record("one")) and writer_of(store, PLACE, tmp_path) == "one"


@pytest.mark.slow
def test_s3_bucket_that_is_not_there_is_told(root: str, tmp_path: Path) -> None:
    store = opened("s3://no-such-bucket/fleet")
    for act in (
        lambda: store.publish(made(tmp_path / "1", "one"), PLACE, record("one")),
        lambda: store.records("objects"),
        lambda: store.create("x", b""),
        lambda: store.read("x"),
    ):
        with pytest.raises(OutputError, match="no such bucket"):
            act()


@pytest.mark.slow
def test_s3_without_credentials_says_which_variables(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(bucket, "RETRIES", 0)
    monkeypatch.setattr(bucket, "CONNECT_SECONDS", 1.0)
    with pytest.raises(OutputError, match="AWS_ACCESS_KEY_ID"):
        opened(root).read("fleet.json")


@pytest.mark.slow
def test_s3_folder_of_an_adapter_comes_to_the_cache(root: str, proxy: s3.Proxy, tmp_path: Path) -> None:
    store = opened(root)
    store.replace("acme/adapter_config.json", b"{}")
    store.replace("acme/weights.bin", b"7" * 3_000_000)
    proxy.seen.clear()
    proxy.rule = lambda count, method, path: "cut" if count == 3 else None
    found = localized(f"{root}/acme", tmp_path / "cache")
    assert (found / "weights.bin").read_bytes() == b"7" * 3_000_000
    asked = len(proxy.seen)
    assert localized(f"{root}/acme", tmp_path / "cache") == found and len(proxy.seen) == asked + 1


@pytest.mark.slow
def test_s3_uploads_killed_at_any_moment_leave_whole_objects_or_none(
    root: str, server: s3.Server, tmp_path: Path
) -> None:
    """Two writers of each of 24 objects; then one that lives."""
    turns = int(os.environ.get("LORA_EXPORT_KILLED_UPLOADS", "24"))
    command = [sys.executable, "-m", "tests.fleet.uploads", root, str(tmp_path), str(turns), "28"]
    subprocess.run(command, check=True, timeout=600)
    store = opened(root)
    whole = leftover = 0
    for turn in range(turns):
        place, sizes = f"objects/{uploads.key(turn)}", uploads.sizes(turn)
        there = store.read(f"{place}/record.json") is not None
        whole += there
        leftover += len({n.split("/")[2] for n in store.names(place)}) - 2 * there > 0
        if there:
            assert writer_of(store, place, tmp_path, sizes).startswith("killed")
        last = made(tmp_path / f"last-{turn}", "last", sizes)
        assert store.publish(last, place, record("last", uploads.key(turn))) != there
        assert (writer_of(store, place, tmp_path, sizes) == "last") != there
        if not there:
            assert len(list(store.names(place))) == len(sizes) + 1
    told = f"{2 * turns} killed, {whole} objects whole, {leftover} with leftovers, {server.uploads()} parts left"
    assert 0 < whole < turns and leftover, told
    verified = verify_root(root, SILENT)
    assert verified.verified and verified.checks[0].note.startswith(f"{turns + len(uploads.UNDISTURBED)} objects")
