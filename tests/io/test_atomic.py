"""Outputs appear whole or not at all, on disks that lack a call too."""

import errno
import os
import stat

import pytest

from sdd_lora.errors import BadInput, Busy, SddLoraError
from sdd_lora.io import atomic


def failing(number, only_folders=False):
    real = os.fsync

    def fsync(descriptor):
        if not only_folders or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    return fsync


@pytest.mark.parametrize("only_folders", [True, False])
def test_a_share_that_syncs_nothing_still_gets_its_files(tmp_path, monkeypatch, only_folders):
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL, only_folders))
    with atomic.atomic_output(tmp_path / "a") as file:
        file.write(b"whole")
    with atomic.atomic_folder(tmp_path / "folder") as folder:
        (folder / "b").write_bytes(b"whole")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "folder" / "b").read_bytes() == b"whole"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a Windows file system has no pipes")
def test_no_file_takes_the_place_of_a_pipe_or_a_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(BadInput, match="pipe: a pipe or a device; expected the name of a file"),
        atomic.atomic_output(tmp_path / "pipe"),
    ):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_file_that_is_whole_is_never_called_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EIO, only_folders=True))
    with atomic.atomic_output(tmp_path / "a") as file:
        file.write(b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_bytes_that_did_not_reach_the_disk_are_an_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(SddLoraError, match="not written"), atomic.atomic_output(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_share_without_unnamed_files_or_permissions_gets_its_files(tmp_path, monkeypatch):
    def refuse(*arguments, **named):
        raise PermissionError(errno.EPERM, "no permissions here")

    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    monkeypatch.setattr(os, "chmod", refuse)
    with atomic.atomic_output(tmp_path / "a") as file:
        file.write(b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(os.name == "nt", reason="no flock there")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_a_share_without_locks_is_used_without(tmp_path, monkeypatch, number):
    import fcntl

    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with atomic.locked(tmp_path):
        pass
    with atomic.atomic_folder(tmp_path / "folder") as folder:
        (folder / "b").write_bytes(b"whole")
    assert (tmp_path / "folder" / "b").exists()


@pytest.mark.skipif(os.name == "nt", reason="no flock there")
def test_a_lock_that_another_holds_is_busy(tmp_path):
    with atomic.locked(tmp_path), pytest.raises(Busy), atomic.locked(tmp_path):
        pass
    with atomic.locked(tmp_path, shared=True), atomic.locked(tmp_path, shared=True):
        pass
