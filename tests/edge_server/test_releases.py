import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import IntegrityError, StoreError
from edge_sdk.index import hash_blocks, parse_index
from edge_sdk.manifest import MANIFEST_NAME, digest_of
from edge_sdk.messages import BLOCK_BYTES, Need, Topics, block_count, to_bitmap
from edge_sdk.transport import MemoryBroker, MemoryTransport
from edge_server.errors import ReleaseError
from edge_server.releases import SMALL_BLOCKS, BlobStore, BlockServer, check, describe, take_in

NOW = 1_767_225_600.0


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def listener():
    transport = MemoryTransport(MemoryBroker())
    transport.connect()
    transport.subscribe("#")
    return transport


def need(data, blocks=None, *, size=None):
    count = block_count(len(data))
    wanted = set(range(count)) if blocks is None else blocks
    return Need(digest=digest_of(data), size=len(data) if size is None else size, blocks=to_bitmap(wanted, count))


class TestBlobs:
    @given(size=st.sampled_from([0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES]))
    def test_blocks_put_together_give_the_file(self, tmp_path_factory, size):
        blobs = BlobStore(tmp_path_factory.mktemp("blobs"))
        data = bytes(i % 251 for i in range(size))
        blobs.put(data, digest_of(data))
        parts = [blobs.block(digest_of(data), i) for i in range(block_count(size))]
        assert b"".join(parts) == data

    def test_bytes_of_another_hash_are_refused(self, blobs):
        with pytest.raises(IntegrityError, match="changed while it was read"):
            blobs.put(b"new", digest_of(b"old"))

    def test_a_file_of_another_hash_is_refused_and_leaves_nothing(self, blobs, tmp_path):
        (tmp_path / "new").write_bytes(b"new")
        with pytest.raises(IntegrityError, match="changed while it was read"):
            blobs.put_file(tmp_path / "new", digest_of(b"old"))
        assert list((tmp_path / "blobs").iterdir()) == []

    @pytest.mark.parametrize("digest", ["", "../secret", "a" * 63, "A" * 64, "a" * 63 + "/", "a" * 64 + "\n"])
    def test_what_is_no_hash_is_never_a_path(self, blobs, tmp_path, digest):
        (tmp_path / "secret").write_text("x")
        assert blobs.size(digest) is None

    def test_a_file_left_short_by_a_crash_is_written_again(self, blobs, tmp_path):
        digest = digest_of(b"whole")
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / digest).write_bytes(b"wh")
        blobs.put(b"whole", digest)
        assert blobs.block(digest, 0) == b"whole"

    def test_a_file_that_vanished_is_a_store_error(self, blobs):
        with pytest.raises(StoreError, match="cannot read"):
            blobs.block("a" * 64, 0)


def keep(folder, blobs):
    manifest, data = check(folder)
    take_in(folder, manifest, data, blobs)
    return manifest, data


class TestDescribe:
    def test_the_index_has_the_hash_of_every_block_of_every_file(self, blobs, checkpoint):
        trunk = bytes(i % 251 for i in range(2 * BLOCK_BYTES + 5))
        manifest, data = keep(checkpoint(1, trunk=trunk), blobs)
        target = describe(manifest, data, blobs)
        index = parse_index(blobs.read(target.unrecognized_fields["custom"]["index"]["sha256"]))
        assert index.blocks[digest_of(trunk)] == hash_blocks(trunk, BLOCK_BYTES)
        assert set(index.blocks) == {entry.sha256 for entry in manifest.files.values()}

    def test_a_file_that_vanished_is_a_store_error(self, blobs, checkpoint, tmp_path):
        manifest, data = keep(checkpoint(1), blobs)
        (tmp_path / "blobs" / manifest.files["head.npz"].sha256).unlink()
        with pytest.raises(StoreError, match="missing"):
            describe(manifest, data, blobs)


class TestTakeIn:
    def test_manifest_and_files_are_kept_by_content(self, blobs, checkpoint):
        manifest, data = keep(checkpoint(1), blobs)
        assert blobs.size(digest_of(data)) == len(data)
        assert all(blobs.size(entry.sha256) == entry.size for entry in manifest.files.values())

    def test_equal_files_of_two_releases_are_kept_once(self, blobs, checkpoint, tmp_path):
        keep(checkpoint(1), blobs)
        before = len(list((tmp_path / "blobs").iterdir()))
        keep(checkpoint(2), blobs)
        assert len(list((tmp_path / "blobs").iterdir())) == 2 * before - 1, "the trunk is the same"

    @pytest.mark.parametrize("damage", ["altered", "missing", "manifest"])
    def test_a_damaged_checkpoint_is_refused(self, blobs, checkpoint, damage):
        folder = checkpoint(1)
        if damage == "altered":
            (folder / "head.npz").write_bytes(b"head.npz of 9")
        elif damage == "missing":
            (folder / "head.npz").unlink()
        else:
            (folder / MANIFEST_NAME).write_text("{")
        with pytest.raises(IntegrityError):
            keep(folder, blobs)

    @pytest.mark.parametrize("release", [0, -1, 2**53])
    def test_a_release_number_out_of_range_is_refused(self, blobs, checkpoint, release):
        with pytest.raises(ReleaseError, match="release numbers lie in"):
            keep(checkpoint(release), blobs)


class TestBlockServer:
    def make(self, blobs, *, max_queued=100):
        return BlockServer(blobs, Topics(), max_queued=max_queued, repeat_s=0.5)

    def test_devices_that_ask_together_share_one_transmission(self, blobs, listener):
        data = bytes(5 * BLOCK_BYTES)
        blobs.put(data, digest_of(data))
        server = self.make(blobs)
        server.ask(need(data, {0, 1, 2}), NOW)
        server.ask(need(data, {1, 2, 3}), NOW)
        assert server.serve(listener, 64, NOW) == 4
        indices = [Topics().parse_block(message.topic)[1] for message in listener.receive()]
        assert indices == [0, 1, 2, 3]

    def test_a_turn_sends_a_bounded_number_and_the_rest_later(self, blobs, listener):
        data = bytes(5 * BLOCK_BYTES)
        blobs.put(data, digest_of(data))
        server = self.make(blobs)
        server.ask(need(data), NOW)
        assert [server.serve(listener, 2, NOW) for _ in range(4)] == [2, 2, 1, 0]

    def test_the_queue_is_bounded(self, blobs):
        data = bytes(9 * BLOCK_BYTES)
        blobs.put(data, digest_of(data))
        server = self.make(blobs, max_queued=4)
        server.ask(need(data), NOW)
        assert server.queued == 4

    def test_requests_for_what_is_not_here_are_counted(self, blobs):
        blobs.put(b"data", digest_of(b"data"))
        server = self.make(blobs)
        server.ask(need(b"other"), NOW)
        server.ask(need(b"data", size=5), NOW)
        server.ask(Need(digest="../../etc/passwd", size=1, blocks=b"\xff"), NOW)
        assert (server.refused, server.queued) == (3, 0)

    def test_blocks_beyond_the_end_are_ignored(self, blobs):
        blobs.put(b"data", digest_of(b"data"))
        server = self.make(blobs)
        server.ask(Need(digest=digest_of(b"data"), size=4, blocks=b"\xff" * 1000), NOW)
        assert server.queued == 1

    def test_without_a_connection_the_queue_is_dropped(self, blobs, listener):
        blobs.put(b"data", digest_of(b"data"))
        server = self.make(blobs)
        server.ask(need(b"data"), NOW)
        listener.online = False
        assert server.serve(listener, 64, NOW) == 0
        assert server.queued == 0

    def test_a_block_of_a_large_file_is_not_sent_again_while_it_is_on_its_way(self, blobs, listener):
        data = bytes((SMALL_BLOCKS + 2) * BLOCK_BYTES)
        blobs.put(data, digest_of(data))
        server = self.make(blobs)
        for at, asked, sent in ((0.0, {0, 1}, 2), (0.4, {0, 1, 2}, 1), (0.6, {0, 1, 2}, 2)):
            server.ask(need(data, asked), NOW + at)
            assert server.serve(listener, 64, NOW + at) == sent

    def test_a_small_file_is_sent_again_once_for_all_who_were_late(self, blobs, listener):
        blobs.put(b"data", digest_of(b"data"))
        server = self.make(blobs)
        for at, sent in ((0.0, 1), (0.03, 0), (0.06, 0), (0.11, 1), (0.3, 1)):
            server.ask(need(b"data"), NOW + at)
            assert server.serve(listener, 64, NOW + at) == sent

    def test_a_clock_that_is_set_back_holds_nothing_up(self, blobs, listener):
        data = bytes((SMALL_BLOCKS + 2) * BLOCK_BYTES)
        blobs.put(data, digest_of(data))
        server = self.make(blobs)
        for now in (NOW, NOW - 1e6, NOW - 2e6):
            server.ask(need(data, {0}), now)
            assert server.serve(listener, 64, now) == 1
