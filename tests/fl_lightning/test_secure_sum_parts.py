"""Parts of secure sums: shares of secrets, masks, keys, the grid, terms."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from aadp_kernels import tail_cutoff
from fl_lightning.deploy.policy import Refused
from fl_lightning.deploy.secure_sum import shamir
from fl_lightning.deploy.secure_sum.__main__ import main as identity_of
from fl_lightning.deploy.secure_sum.begun import Begun
from fl_lightning.deploy.secure_sum.grid import LARGEST_DRAW, Block, Grid
from fl_lightning.deploy.secure_sum.keys import Identity, RoundKeys, agree, seal, signed_by, unseal
from fl_lightning.deploy.secure_sum.masks import _AT_ONCE, add_mask
from fl_lightning.deploy.secure_sum.node import IDENTITY_FILE
from fl_lightning.deploy.secure_sum.policy import SumPolicy
from fl_lightning.deploy.secure_sum.terms import check_terms, head_of, parse_terms
from fl_lightning.values.message import decode, encode
from tests.fl_lightning.secure_sums import IDENTITIES, terms_of

# --- shares of secrets ---


def test_known_shares() -> None:
    """The example of Shamir's scheme on Wikipedia: 1234 + 166 x + 94 x² modulo 1613."""
    coefficients = iter([166, 94])
    options = {"prime": 1613, "draw": lambda _: next(coefficients)}
    found = shamir.split(1234, 3, range(1, 7), **options)
    assert found == {1: 1494, 2: 329, 3: 965, 4: 176, 5: 1188, 6: 775}
    weights = shamir.weights_at_zero([2, 4, 5], prime=1613)
    assert shamir.combine(found, weights, prime=1613) == 1234


def test_the_prime_is_the_first_above_256_bits() -> None:
    def maybe_prime(n: int) -> bool:
        odd, twos = n - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
            x = pow(base, odd, n)
            if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
                return False
        return True

    assert [n for n in range(2**256, shamir.PRIME + 1) if n % 2 and maybe_prime(n)] == [
        shamir.PRIME
    ]


@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_fewer_shares_than_the_threshold_are_uniform_whatever_the_secret(threshold: int) -> None:
    """All polynomials over a small field, one by one."""
    prime, points = 7, [1, 3, 6]
    for chosen in itertools.combinations(points, threshold - 1):
        seen = {}
        for secret in range(prime):
            counts: Counter[tuple[int, ...]] = Counter()
            for drawn in itertools.product(range(prime), repeat=threshold - 1):
                rest = iter(drawn)
                options = {"prime": prime, "draw": lambda _, rest=rest: next(rest)}
                shares = shamir.split(secret, threshold, points, **options)
                counts[tuple(shares[x] for x in chosen)] += 1
                for enough in itertools.combinations(points, threshold):
                    weights = shamir.weights_at_zero(enough, prime=prime)
                    assert shamir.combine(shares, weights, prime=prime) == secret
            seen[secret] = counts
        assert len(set(seen[0].values())) == 1
        assert len(seen[0]) == prime ** (threshold - 1)
        assert all(counts == seen[0] for counts in seen.values())


def test_shares_of_32_bytes() -> None:
    secret = 2**256 - 1
    shares = shamir.split(secret, 5, range(1, 9))
    kept = {x: shamir.from_bytes(shamir.to_bytes(s)) for x, s in shares.items()}
    assert shamir.combine(kept, shamir.weights_at_zero([8, 2, 3, 5, 7])) == secret
    assert shamir.combine(kept, shamir.weights_at_zero([8, 2, 3, 5])) != secret
    assert shamir.split(secret, 5, range(1, 9)) != shares


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [
        (shamir.PRIME, 1, [1]),
        (-1, 1, [1]),
        (1, 0, [1]),
        (1, 3, [1, 2]),
        (1, 1, [0, 1]),
        (1, 1, [1, 1]),
    ],
)
def test_what_cannot_be_shared(secret: int, threshold: int, points: list[int]) -> None:
    with pytest.raises(ValueError):
        shamir.split(secret, threshold, points)


@pytest.mark.parametrize("data", [b"", bytes(32), b"\xff" * 33, bytes(34)])
def test_bytes_that_are_no_share(data: bytes) -> None:
    with pytest.raises(ValueError, match="no number of the field"):
        shamir.from_bytes(data)


# --- masks ---


def test_masks_are_the_key_stream_of_chacha20() -> None:
    """RFC 8439, A.1, test vectors 1 and 2: zero key and nonce, blocks 0 and 1."""
    total = np.zeros(16, dtype=np.uint64)
    add_mask(total, bytes(32), sign=1)
    stream = total.astype("<u8").tobytes()
    assert stream[:16].hex() == "76b8e0ada0f13d90405d6ae55386bd28"
    assert stream[64:80].hex() == "9f07e7be5551387a98ba977c732d080d"
    whole = Cipher(ChaCha20(b"s" * 32, bytes(16)), mode=None).encryptor().update
    total = np.zeros(2 * _AT_ONCE + 3, dtype=np.uint64)
    add_mask(total, b"s" * 32, sign=1)
    assert total.astype("<u8").tobytes() == whole(bytes(8 * len(total)))


@pytest.mark.parametrize("size", [0, 1, 7, _AT_ONCE, 2 * _AT_ONCE + 3])
def test_a_mask_is_added_and_taken_away(size: int) -> None:
    start = np.arange(size, dtype=np.uint64)
    total = start.copy()
    add_mask(total, b"s" * 32, sign=1)
    assert size < 3 or not (total[1:] == start[1:]).any()
    # A longer vector begins with the same numbers.
    longer = np.zeros(size + 5, dtype=np.uint64)
    add_mask(longer, b"s" * 32, sign=1)
    assert ((total - start) == longer[:size]).all()
    add_mask(total, b"s" * 32, sign=-1)
    assert (total == start).all()


def test_what_cannot_be_masked() -> None:
    with pytest.raises(ValueError, match="sign=0"):
        add_mask(np.zeros(1, dtype=np.uint64), bytes(32), sign=0)
    with pytest.raises(ValueError, match="more than a seed masks"):
        add_mask(np.broadcast_to(np.uint64(0), (2**34 + 1,)), bytes(32), sign=1)


# --- keys ---


def test_agreed_keys_are_of_both_ends_one_purpose_and_one_round() -> None:
    a, b = RoundKeys(), RoundKeys()
    key = agree(a.mask, b.public[1], "mask", b"terms")
    assert key == agree(b.mask, a.public[1], "mask", b"terms")
    others = [
        agree(a.mask, b.public[1], "share", b"terms"),
        agree(a.mask, b.public[1], "mask", b"terms of another round"),
        agree(a.mask, b.public[1], "mask", b"ter", b"ms"),
        agree(a.seal, b.public[1], "mask", b"terms"),
    ]
    assert len({key, *others}) == 5


@pytest.mark.parametrize("public", [bytes(32), (1).to_bytes(32, "little"), b"", bytes(31)])
def test_keys_that_anybody_would_agree_on_are_refused(public: bytes) -> None:
    with pytest.raises(ValueError):
        agree(RoundKeys().mask, public, "mask")


def test_signatures_are_of_one_purpose_and_one_list_of_parts() -> None:
    signature = IDENTITIES[0].sign("keys", b"ab", b"c")
    name = IDENTITIES[0].name
    assert signed_by(name, signature, "keys", b"ab", b"c")
    assert not signed_by(name, signature, "keys", b"a", b"bc")
    assert not signed_by(name, signature, "survivors", b"ab", b"c")
    assert not signed_by(IDENTITIES[1].name, signature, "keys", b"ab", b"c")
    assert not signed_by(name, signature[:-1], "keys", b"ab", b"c")
    assert not signed_by("zz" * 32, signature, "keys", b"ab", b"c")


def test_what_is_sealed_is_opened_by_its_key_and_for_its_parts_alone() -> None:
    sealed = seal(b"k" * 32, b"share", b"from", b"to")
    assert unseal(b"k" * 32, sealed, b"from", b"to") == b"share"
    for key, data, parts in (
        (b"l" * 32, sealed, (b"from", b"to")),
        (b"k" * 32, sealed, (b"to", b"from")),
        (b"k" * 32, bytes([sealed[0] ^ 1]) + sealed[1:], (b"from", b"to")),
    ):
        with pytest.raises(ValueError, match="cannot be opened"):
            unseal(key, data, *parts)


def test_an_identity_stays_in_its_file_and_others_cannot_read_it(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    name = Identity.kept_in(path).name
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.kept_in(path).name == name
    assert "private" not in repr(Identity.kept_in(path))
    path.chmod(0o640)
    with pytest.raises(ValueError, match="others can read it"):
        Identity.kept_in(path)


# --- the grid ---

GRID = Grid((Block(50_000, 3.0, 0.7), Block(4, 1.0, 30.0)), clients=10, noise_parts=4)


def test_steps_are_powers_of_two_far_below_the_noise() -> None:
    for block, step in zip(GRID.blocks, GRID.steps, strict=True):
        share = block.scale / 2
        assert math.frexp(step)[0] == 0.5
        assert 2**24 <= share / step < 2**25


def test_the_largest_draw_is_beyond_that_of_every_form() -> None:
    assert max(tail_cutoff("gaussian", form) for form in ("wide", "fast")) <= LARGEST_DRAW


def test_whole_numbers_are_the_nearest_and_come_back() -> None:
    draw = torch.Generator().manual_seed(3)
    values = [torch.randn(b.size, generator=draw, dtype=torch.float64) for b in GRID.blocks]
    back = GRID.real(GRID.whole(values))
    for value, found, step in zip(values, back, GRID.steps, strict=True):
        assert float((value - found).abs().max()) <= step / 2
        assert abs(float((value - found).mean())) < step


def test_the_sum_of_rounded_noised_numbers_has_the_noise_of_the_whole() -> None:
    """As many shares as are needed: accepted at the noise scale, not at 2/3 and 3/2 of it."""
    grid = Grid((Block(20_000, 0.0, 0.7),), clients=4, noise_parts=4)
    draw = torch.Generator().manual_seed(4)
    parts = [torch.randn(20_000, generator=draw, dtype=torch.float64) * 0.35 for _ in range(4)]
    (total,) = grid.real(torch.stack([grid.whole([part]) for part in parts]).sum(0))
    fits = [stats.kstest(total.numpy(), stats.norm(scale=s).cdf).pvalue for s in (0.7, 0.47, 1.05)]
    assert fits[0] > 1e-4
    assert max(fits[1:]) < 1e-4


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e300, 3.0 + 16 * 0.35 + 1e-6, -9.0])
def test_numbers_beyond_their_bound_are_refused(value: float) -> None:
    values = [torch.zeros(b.size, dtype=torch.float64) for b in GRID.blocks]
    values[0][7] = 3.0 + 16 * 0.35 - 1e-6
    GRID.whole(values)
    values[0][7] = value
    with pytest.raises(ValueError, match="beyond its clip norm and largest noise"):
        GRID.whole(values)


def test_bounds_of_all_clients_cannot_wrap_around() -> None:
    assert max(GRID.bounds) * GRID.clients < 2**63
    Grid((Block(1, 2.0**20, 1.0),), clients=100, noise_parts=1)
    with pytest.raises(ValueError, match="wrap around"):
        Grid((Block(1, 2.0**38, 1.0),), clients=2, noise_parts=1)
    most = Grid((Block(1, 2.0**37, 1.0),), clients=3, noise_parts=1)
    with pytest.raises(ValueError, match="wrap around"):
        Grid(most.blocks, clients=4, noise_parts=1)


@pytest.mark.parametrize(
    "block", [Block(1, 1.0, 0.0), Block(1, math.inf, 1.0), Block(1, -1.0, 1.0), Block(0, 1.0, 1.0)]
)
def test_blocks_that_no_sum_has(block: Block) -> None:
    with pytest.raises(ValueError, match="needs a clip norm and Gaussian noise"):
        Grid((block,), clients=2, noise_parts=1)


def test_a_sum_that_is_none_is_noticed() -> None:
    total = torch.tensor([*([0] * 50_000), 0, 0, 0, 0])
    assert GRID.holds(total, 2)
    total[3] = 2 * GRID.bounds[0]
    assert GRID.holds(total, 2)
    total[3] += 1
    assert not GRID.holds(total, 2)
    total[3] = -(2**63)
    assert not GRID.holds(total, 2)


# --- terms ---


def test_terms_pass_through_a_message_and_every_part_counts() -> None:
    terms = terms_of(4, shares=2, corrupt=1)
    read = parse_terms(decode(encode({"terms": head_of(terms)}))[0]["terms"])
    assert read == terms
    assert read.digest == terms.digest
    others = [
        terms_of(5, shares=2, corrupt=1),
        terms_of(4, shares=1, corrupt=1),
        terms_of(4, shares=2, corrupt=0),
        terms_of(4, shares=2, corrupt=1, run="c" * 64),
        terms_of(4, shares=2, corrupt=1, round=1),
        terms_of(4, shares=2, corrupt=1, context="c" * 64),
        terms_of(4, shares=2, corrupt=1, blocks=(Block(11, 1.0, 2.0),)),
    ]
    assert len({t.digest for t in [terms, *others]}) == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": "A" * 64}, "64 hex digits"),
        ({"members": ["a" * 63]}, "64 hex digits"),
        ({"members": ["a" * 64] * 3}, "named twice"),
        ({"members": ["a" * 64]}, "1 members are fewer than 2"),
        ({"members": "abc"}, "must be lists"),
        ({"round": -1}, "round=-1"),
        ({"round": True}, "round=True"),
        ({"shares": 0}, "shares=0"),
        ({"corrupt": -1}, "corrupt=-1"),
        ({"corrupt": 4}, "members are fewer than"),
        ({"shares": 5}, "members are fewer than"),
        ({"blocks": [{"size": 1}]}, "blocks cannot be read"),
        ({"blocks": [{"size": 1.5, "reach": 1, "scale": 1}]}, "blocks must have"),
        ({"blocks": [{"size": 1, "reach": "inf", "scale": 1}]}, "blocks must have"),
        ({"blocks": []}, "0 numbers"),
        ({"more": 1}, "terms must have"),
    ],
)
def test_terms_that_make_no_sense(change: dict, words: str) -> None:
    head = head_of(terms_of(4)) | change
    with pytest.raises(ValueError, match=words):
        parse_terms(head)


def test_a_holder_insists_on_its_list_and_on_what_it_fears() -> None:
    names = [identity.name for identity in IDENTITIES]
    assert check_terms(terms_of(4), SumPolicy(names, 0), names[2]) == 2
    for policy, own, words in (
        (SumPolicy(names[:3], 0), names[2], "1 members are not listed"),
        (SumPolicy(names, 0), names[4], "not a member"),
        (SumPolicy(names, 1), names[2], "corrupt=0, the holder allows for 1"),
        (SumPolicy(names, 0, least=4), names[2], "3 clients are enough"),
    ):
        with pytest.raises(Refused, match=words):
            check_terms(terms_of(4), policy, own)
    with pytest.raises(ValueError, match="identities has 'x'"):
        SumPolicy(["x"], 0)
    with pytest.raises(ValueError, match="least=1"):
        SumPolicy(names, 0, least=1)


# --- rounds begun ---


def test_a_round_begins_once_whatever_happens_to_the_process(tmp_path: Path) -> None:
    begun = Begun(tmp_path, runs=2)
    begun.begin("a", 3)
    for again in (begun, Begun(tmp_path, runs=2)):
        for round in (3, 2):
            with pytest.raises(Refused, match="is not after round 3"):
                again.begin("a", round)
    begun.begin("b", 0)
    begun.begin("a", 4)
    with pytest.raises(Refused, match="runs=2"):
        Begun(tmp_path, runs=2).begin("c", 0)
    (tmp_path / "sums.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        Begun(tmp_path, runs=2)


def test_the_command_that_prints_an_identity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert identity_of([str(tmp_path / "node")]) == 0
    name = capsys.readouterr().out.strip()
    assert name == Identity.kept_in(tmp_path / "node" / IDENTITY_FILE).name
    (tmp_path / "node" / IDENTITY_FILE).chmod(0o644)
    for arguments, words in (([str(tmp_path / "node")], "others can read it"), ([], "identity")):
        assert identity_of(arguments) == 2
        printed = capsys.readouterr()
        assert words in printed.err
        assert not printed.out
