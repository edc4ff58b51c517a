import os
import socket
import stat

import pytest

from matfact import _files

posix = pytest.mark.skipif(os.name == "nt", reason="needs links, modes and locks of POSIX")
root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
LEFT = ".results.csv.matfact-0123456789abcdef.part"


def test_a_write_that_fails_leaves_the_earlier_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    _files.write_atomically(path, b"earlier")

    def fail(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        _files.write_atomically(path, b"later")
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["results.csv"]


@pytest.mark.parametrize("name", ["results.csv", "ö" * 125, "x" * 255])
def test_a_later_write_replaces_an_earlier_one(tmp_path, name):
    path = tmp_path / name
    for content in (b"earlier", b"later"):
        _files.write_atomically(path, content)
    assert path.read_bytes() == b"later"
    assert os.listdir(tmp_path) == [name]


def place(kind, path):
    """Put something at `path` that is no regular file."""
    if kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to(os.devnull)


@posix
@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a socket", "a device"])
def test_what_is_no_regular_file_is_left_alone(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = tmp_path / "out"
    place(kind, path.relative_to(tmp_path))
    before = os.lstat(path)

    def content():
        pytest.fail("refused only after the work")
        yield

    with pytest.raises(ValueError, match=f"out must be a regular file, but it is {kind}"):
        _files.write_atomically(path, content())
    with pytest.raises(ValueError, match=f"but it is {kind}"):
        _files.check_output(path)
    assert os.path.samestat(os.lstat(path), before)
    assert os.listdir(tmp_path) == ["out"]


@posix
def test_a_pipe_that_a_link_in_proc_leads_to_is_refused():
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    reading, writing = os.pipe()
    try:
        with pytest.raises(ValueError, match="a named pipe"):
            _files.write_atomically(f"/proc/self/fd/{writing}", b"content")
    finally:
        os.close(reading)
        os.close(writing)


@posix
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(exists, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "data", tmp_path / "link"
    if exists:
        target.write_bytes(b"earlier")
    link.symlink_to(target)
    _files.write_atomically(link, b"later")
    assert link.is_symlink()
    assert target.read_bytes() == b"later"
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link"]


@posix
def test_a_link_in_a_folder_of_ours_is_refused(tmp_path):
    (tmp_path / "secret").write_bytes(b"earlier")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="a link"), _files.replacing(tmp_path / "link"):
        pytest.fail("opened")
    assert (tmp_path / "secret").read_bytes() == b"earlier"


@posix
def test_links_that_lead_to_one_another_are_an_error(tmp_path):
    for one, other in ("ab", "ba"):
        (tmp_path / one).symlink_to(tmp_path / other)
    with pytest.raises(OSError, match="symbolic links"):
        _files.write_atomically(tmp_path / "a", b"content")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@posix
def test_the_mode_is_kept_and_secret_from_the_beginning(tmp_path):
    path = tmp_path / "results.csv"
    path.write_bytes(b"earlier")
    path.chmod(0o600)

    def content():
        yield b"later"
        assert {stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.iterdir()} == {0o600}

    _files.write_atomically(path, content())
    assert path.read_bytes() == b"later"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@root
def test_the_owner_is_kept(tmp_path):
    path, folder = tmp_path / "results.csv", tmp_path / "network"
    path.write_bytes(b"earlier")
    folder.mkdir()
    for each in (path, folder):
        os.chown(each, 12345, 23456)
        each.chmod(0o770)
    _files.write_atomically(path, b"later")
    with _files.replacing_folder(_files.output_folder(folder)) as partial:
        (partial / "file").write_bytes(b"content")
    assert (folder / "file").exists()
    for each in (path, folder):
        status = each.stat()
        found = (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))
        assert found == (12345, 23456, 0o770)


def as_another_user(work, folder):
    """Return what `work` raises, as text, in a process of a user without rights."""
    for each in (folder, *folder.parents[:3]):  # that the user may reach it
        each.chmod(each.stat().st_mode | 0o111)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:  # the numbers of a process cannot be taken back
        try:
            os.setgid(12345)
            os.setuid(12345)
            work()
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading, "rb") as said:
        return said.read().decode()


@root
@pytest.mark.parametrize(("owner", "mode"), [(12345, 0o444), (0, 0o666)])
def test_files_that_may_not_be_replaced_are_refused_before_the_work(owner, mode, tmp_path):
    tmp_path.chmod(0o777)
    path = tmp_path / "results.csv"
    path.write_bytes(b"earlier")
    os.chown(path, owner, owner)
    path.chmod(mode)
    message = as_another_user(lambda: _files.check_output(path), tmp_path)
    assert "PermissionError" in message
    assert str(path) in message
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["results.csv"]


@root
def test_a_folder_that_cannot_be_listed_is_written_to(tmp_path):
    tmp_path.chmod(0o333)
    path = tmp_path / "results.csv"
    assert as_another_user(lambda: _files.write_atomically(path, b"content"), tmp_path) == ""
    assert path.read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["results.csv"]


@posix
def test_only_our_own_leftovers_that_nobody_writes_are_removed(tmp_path):
    kept = [".movie.part", ".results.csv.0123abcd.part", LEFT.replace("results", "other")]
    for name in (*kept, LEFT):
        (tmp_path / name).write_bytes(b"content")
    with _files.claimed(tmp_path / LEFT):
        _files.write_atomically(tmp_path / "results.csv", b"content")
        assert LEFT in os.listdir(tmp_path)
    _files.write_atomically(tmp_path / "results.csv", b"content")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "results.csv"])
    _files.remove_partial_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept[:2], "results.csv"])


def test_what_is_being_written_is_no_leftover(tmp_path):
    path = tmp_path / "results.csv"

    def content():
        yield b"first"
        _files.write_atomically(path, b"second")
        assert len(os.listdir(tmp_path)) == 2

    _files.write_atomically(path, content())
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["results.csv"]


def test_input_is_no_place_for_output(tmp_path):
    (tmp_path / "model").write_bytes(b"weights")
    (tmp_path / "other").hardlink_to(tmp_path / "model")
    for name in ("model", "other"):
        with pytest.raises(ValueError, match="which is read"):
            _files.check_output(tmp_path / name, [tmp_path / "missing", tmp_path / "model"])
    _files.check_output(tmp_path / "new", [tmp_path / "model"])
    assert sorted(os.listdir(tmp_path)) == ["model", "other"]
