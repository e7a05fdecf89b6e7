"""Mistakes in sums of clients, secure or not: what is added, masked, signed, checked beforehand."""

from __future__ import annotations

from tests.mutation.mutations import group

_HERE = "tests/fl_lightning/test_secure_sum"
_PARTS, _SUMS = f"{_HERE}_parts.py", f"{_HERE}.py"
_REFUSALS = f"{_HERE}_refusals.py {_HERE}_reveals.py"
_RUNS = f"{_HERE}_federation.py"
_LIES = f"{_HERE}_lies.py"
_GIVEN_UP = "test_a_sum_that_is_given_up_is_charged_and_moves_nothing"
_FORGOT = "test_a_node_that_forgot_the_run_is_reminded"
_RESTART = "test_secret_noise_is_new_in_every_part_and_nodes_go_on_after_a_restart"
_MORE = "test_a_server_that_asks_for_more_rounds_gets_no_more_than_was_promised"
_NOISE = "test_the_shares_of_as_many_as_are_needed_have_the_noise_of_the_whole"
_FILE = "fl_lightning/deploy/secure_sum/"

SHAMIR = group(
    f"{_FILE}shamir.py",
    _PARTS,
    ("one coefficient too few", "for _ in range(threshold - 1))]", "for _ in range(max(threshold - 2, 0)))]"),
    ("coefficients from half of the field", "*(draw(prime) for", "*(draw(prime) // 2 for"),
    ("a smaller prime", "PRIME = 2**256 + 297", "PRIME = 2**256 - 189"),
    ("a share at zero", "all(1 <= x < prime", "all(0 <= x < prime"),
    ("shares beyond the field", "or share >= PRIME", "or False"),
)  # fmt: skip

KEYS = group(
    f"{_FILE}keys.py",
    _PARTS,
    ("agreed keys without a purpose", "joined([_DOMAIN, purpose.encode(), *ends, *parts])", "joined([_DOMAIN, *ends, *parts])"),
    ("agreed keys without the terms", "purpose.encode(), *ends, *parts])", "purpose.encode(), *ends])"),
    ("signatures without a purpose", "key.verify(signature, joined([_DOMAIN, purpose.encode(), *parts]))", "key.verify(signature, joined([_DOMAIN, b\"keys\", *parts]))"),
    ("parts without their lengths", 'b"".join(len(part).to_bytes(8, "big") + part for part in parts)', 'b"".join(part for part in parts)'),
    ("an identity that others read", "path.stat().st_mode & 0o077", "path.stat().st_mode & 0o007"),
    ("sealed for anybody", "encrypt(_ONE_USE, data, joined(parts))", "encrypt(_ONE_USE, data, b\"\")"),
)  # fmt: skip

MASKS = group(
    f"{_FILE}masks.py",
    _PARTS,
    ("the same words in every piece", "        combine(part", "        stream = Cipher(algorithms.ChaCha20(seed, _NONCE), mode=None).encryptor()\n        combine(part"),
    ("always added", "np.add if sign == 1 else np.subtract", "np.add"),
    ("more numbers than a seed has", "if len(total) > MOST_NUMBERS:", "if False:"),
)  # fmt: skip

GRID = group(
    f"{_FILE}grid.py",
    _PARTS,
    ("steps as coarse as the noise", "FINENESS = 24", "FINENESS = 4"),
    ("no noise in the bound", "block.reach + LARGEST_DRAW *", "block.reach + 0 * LARGEST_DRAW *"),
    ("no clip norm in the bound", "most = block.reach + LARGEST_DRAW", "most = LARGEST_DRAW"),
    ("numbers beyond their bound", "if not all(bool((s.abs() <= b).all())", "if not all(bool((s.abs() <= 1e300).all())"),
    ("rounded down", "torch.cat([s.round().long() for s in steps])", "torch.cat([s.floor().long() for s in steps])"),
    ("one client's bound for all", "max(self.bounds, default=0) * self.clients", "max(self.bounds, default=0)"),
    ("wraps around at 2^64", "if most >= 2**63:", "if most >= 2**64:"),
    ("blocks without noise", "0 < block.scale < math.inf", "0 <= block.scale < math.inf"),
    ("a wrong mask goes unseen", "int(part.max()) <= bound * clients", "True"),
)  # fmt: skip

TERMS = group(
    f"{_FILE}terms.py",
    f"{_PARTS} {_SUMS}",
    ("corrupt members count for the noise", "max(self.shares + self.corrupt, (", "max(self.shares, ("),
    ("two sets without an honest member in common", "(len(self.members) + self.corrupt) // 2 + 1", "(len(self.members) + self.corrupt) // 2"),
    ("corrupt members that sign twice", "(len(self.members) + self.corrupt) // 2 + 1", "len(self.members) // 2 + 1"),
    ("a sum of one", "// 2 + 1, 2)", "// 2 + 1, 1)"),
    ("strangers", "    if strangers:", "    if False:"),
    ("less than the holder fears", "if terms.corrupt < policy.corrupt:", "if False:"),
    ("fewer than the holder asks for", "if terms.threshold < policy.least:", "if False:"),
    ("a member named twice", "if len(set(self.members)) < len(self.members):", "if False:"),
    ("too few members", "if self.threshold > len(self.members):", "if False:"),
)  # fmt: skip

BEGUN = group(
    f"{_FILE}begun.py",
    f"{_PARTS} {_REFUSALS}",
    ("a round begun twice", "if round <= self._last.get(run, -1):", "if round < self._last.get(run, -1):"),
    ("forgotten by a crash", "        os.replace(partial, self._path)\n", ""),
    ("any number of runs", "if run not in self._last and len(self._last) >= self._runs:", "if False:"),
)  # fmt: skip

MESSAGES = group(
    f"{_FILE}messages.py",
    _REFUSALS,
    ("keys that nobody signed", "if not keys_are_signed(terms, number, seal, mask, signature):", "if False:"),
    ("keys signed for any terms", "parts = (terms.digest, number_bytes(number), seal, mask)", "parts = (b\"\", number_bytes(number), seal, mask)"),
    ("mask keys without a signature", "number_bytes(number), seal, mask)", "number_bytes(number), seal)"),
    ("equal keys", "    if len(set(public)) < len(public):", "    if False:"),
    ("too few keys", "    if len(keys) < terms.threshold:", "    if False:"),
    ("survivors are not signed", 'for numbers in (keys, sharers, survivors))', 'for numbers in (keys, sharers))'),
    ("sharers are not signed", 'for numbers in (keys, sharers, survivors))', 'for numbers in (keys, survivors))'),
    ("keys are not signed with the survivors", "joined(p for v in keys.values() for p in v[:2])", 'b""'),
    ("members that are none", "if found != sorted(set(found)) or not all(0 <= k < len(terms.members) for k in found):", "if found != sorted(set(found)):"),
    ("lists out of order", "if found != sorted(set(found)) or", "if"),
)  # fmt: skip

CLIENT = group(
    f"{_FILE}client.py",
    f"{_REFUSALS} {_SUMS}",
    ("messages out of turn", "if due != before:", "if False:"),
    ("secrets are kept after a failure", "                self._secrets = None\n                raise", "                raise"),
    ("own keys replaced", "if keys.get(self._number, (b\"\", b\"\", b\"\"))[:2] != secrets.keys.public:", "if False:"),
    ("no own mask", "        add_mask(words, secrets.own_mask, sign=1)\n", ""),
    ("no pairwise masks", "                add_mask(words, seed, sign=sign)\n\n\ndef", "                pass\n\n\ndef"),
    ("both ends add their mask", "return seed, 1 if own < other else -1", "return seed, 1"),
    ("masks of any pair alike", 'agree(keys.mask, public, "mask", terms.digest, *ends)', 'agree(keys.mask, public, "mask", *ends)', "keys are fresh in every round, so a mask's seed is new without the terms too; they are a second reason"),
    ("an own mask that all know", "secrets.own_mask = os.urandom(KEY_BYTES)", "secrets.own_mask = bytes(KEY_BYTES)"),
    ("not charged", "head = self._contribution.write(digest_of([self.terms.digest.hex(), masked]))", 'head = ""'),
    ("the line names what was not masked", "digest_of([self.terms.digest.hex(), masked])", "digest_of([self.terms.digest.hex(), values])"),
    ("values before shares are opened", "        for number, data in sealed.items():\n            secrets.shares[number]", "        self._contribution.values()\n        for number, data in sealed.items():\n            secrets.shares[number]"),
    ("own shares from others", "        if self._number in sealed:", "        if False:"),
    ("a survivor that is not there", "        if self._number not in self._survivors:", "        if False:"),
    ("members that were not there before", "        if not set(found) <= set(of):", "        if False:"),
    ("below the threshold", "        if len(found) < self.terms.threshold:", "        if False:"),
    ("signatures under other survivors", "            if not view_is_signed(self.terms, number, signature, self._view()):", "            if False:"),
    ("both kinds of shares", "        if asked != [self._survivors, gone]:", "        if asked[0] != self._survivors:"),
    ("any own masks", "        if asked != [self._survivors, gone]:", "        if asked[1] != gone:"),
    ("the other kind of shares", "shares[k][:size].hex() for k in self._survivors", "shares[k][size:].hex() for k in self._survivors"),
    ("revealed twice", "        self._secrets = None\n        return encode", "        return encode", "the state machine answers nothing after it; forgetting is a second reason"),
)  # fmt: skip

SERVER = group(
    f"{_FILE}server.py",
    f"{_REFUSALS} {_SUMS}",
    ("lies are handed on: keys", "            if not keys_are_signed(self.terms, number, *found):", "            if False:"),
    ("lies are handed on: signatures", "            if not view_is_signed(self.terms, number, found, view):", "            if False:"),
    ("lies are handed on: shares", "            if {*found, number} != set(self._keys):", "            if False:"),
    ("a key that is not of the shares", "            if public_of(secrets[gone]) != self._keys[gone][1]:", "            if False:"),
    ("a sum that cannot be", "        if not self.terms.grid.holds(self._total, len(self.survivors)):", "        if False:"),
    ("too few are enough", "        if len(found) < self.terms.threshold:", "        if False:"),
    ("masks of who left stay", "                add_mask(words, seed, sign=sign)\n", "                pass\n"),
)  # fmt: skip

CONTRIBUTION = group(
    f"{_FILE}federated.py",
    f"{_LIES}::test_terms_of_a_lying_server_are_refused {_RUNS}::{_GIVEN_UP}",
    ("any number of shares", "        if terms.shares != run.noise_parts:", "        if False:"),
    ("any model", "        if terms.context != _context({", "        if False and terms.context != _context({"),
    ("any noise", "        if [Block(*block) for block in self._part.blocks()] != list(terms.blocks):", "        if False:"),
    ("any weight", "        if asked > 1:", "        if False:"),
    ("nothing charged", "        head = self._part.write(digest)\n", '        head = ""\n'),
)  # fmt: skip

PART = group(
    "fl_lightning/release/sum_part.py",
    f"{_RUNS}::{_RESTART} {_LIES}::{_MORE} {_RUNS}::{_NOISE}",
    ("parts of one run share noise", "releases.key if releases.key.simulated else NoiseKey.random(rules.rng)", "releases.key if True else NoiseKey.random(rules.rng)"),
    ("budget not spent", "        books.budget.spend(line)\n", ""),
    ("no noise", "sums, votes = self._sum.with_noise_parts()", "sums, votes = self._sum.total, self._sum.votes"),
)  # fmt: skip

SHARES = group(
    "fl_lightning/privacy/noised_sum.py",
    f"{_RUNS}::{_NOISE}",
    ("two thirds of a node's share", "        self.total = self._noised(key)\n        self._noise_votes(key)\n        return", "        self.total = [2 / 3 * value for value in self._noised(key)]\n        self._noise_votes(key)\n        return"),
    ("three halves of a node's share", "        self.total = self._noised(key)\n        self._noise_votes(key)\n        return", "        self.total = [1.5 * value for value in self._noised(key)]\n        self._noise_votes(key)\n        return"),
)  # fmt: skip

SUMS = group(
    "fl_lightning/privacy/noised_sum.py",
    "tests/fl_lightning/test_summed.py",
    ("weights forgotten", "            weights=weights,\n            votes_at", "            votes_at"),
    ("clip norms of the votes", "            clip=self.policy.clip_norm[0],\n            scale=None", "            clip=self.policy.clip_norm[0] * 1.5,\n            scale=None"),
    ("noise not bound to the votes", "values = [self._whole, self.votes] if", "values = [self._whole] if"),
    ("noise not bound to the sum", "values = [self._whole, self.votes] if", "values = [self.votes] if"),
)  # fmt: skip

WEIGHTS = group(
    "aadp_kernels/_cpu/clip_sum.py",
    "tests/aadp_kernels/test_cpu_clip_sum.py::test_weights_equal_the_specification",
    ("weights ignored record by record", "mask.double() if weights is None else weights * mask", "mask.double()"),
    ("padding has a weight", "mask.double() if weights is None else weights * mask", "mask.double() if weights is None else weights"),
    ("weights of large records ignored", "        factor = factor * weights[:, None]\n", "        pass\n"),
    ("weights divided by", "decisions.numbers[FACTOR, row, layer] * weights[row]", "decisions.numbers[FACTOR, row, layer] / weights[row]"),
)  # fmt: skip

REMOTE = group(
    "fl_lightning/release/remote_sum.py",
    f"{_RUNS}::{_GIVEN_UP} {_RUNS}::{_FORGOT} {_RUNS}::test_a_node_that_goes_away_at_any_stage",
    ("a sum given up is free", "        if len(outcome.charged):", "        if outcome.sums is not None:"),
    ("forgetful nodes stay away", "        if not self._whole:", "        if False:"),
    ("divided by who was asked", "divisor=float(weights[there].sum())", "divisor=float(weights.sum())"),
)  # fmt: skip

NODE = group(
    "fl_lightning/deploy/client_run.py",
    f"{_LIES}::test_a_part_is_never_released_alone",
    ("a part is released alone", "        if self._module.rules.privacy.summed:\n", "        if False:\n"),
)  # fmt: skip

MUTATIONS = [*SHAMIR, *KEYS, *MASKS, *GRID, *TERMS, *BEGUN, *MESSAGES, *CLIENT, *SERVER]
MUTATIONS += [*CONTRIBUTION, *PART, *SHARES, *SUMS, *WEIGHTS, *REMOTE, *NODE]
