"""The question that the demo and the engine tests ask of a server's journals: did the overlay change what ran?"""

from __future__ import annotations

from collections.abc import Sequence

from overlay.report.journal_reader import Journal


def why_without_effect(journals: Sequence[Journal], expected_layers: int, workers: int = 1) -> str | None:
    """None if the overlay changed what ran, in every worker; else the reason in plain words.

    A patch counts as working when every layer it should reach is patched AND its op has run: the first alone is a claim.
    """
    if not journals:
        return "no process wrote a journal: the overlay was never armed"
    patched = [journal for journal in journals if journal.layers]
    if not patched:
        reasons = sorted({f"{patch.name}: {patch.verdict}, {patch.reason}" for j in journals for patch in j.patches})
        problems = sorted({problem for journal in journals for problem in journal.problems})
        return "no layer was patched" + "".join(f"; {text}" for text in reasons + problems)
    if len(patched) < workers:
        return f"layers were patched in {len(patched)} of {workers} workers"
    for journal in patched:
        if journal.layers != expected_layers:
            refused = sorted({f"{layer}: {why}" for patch in journal.patches for layer, why in patch.refused.items()})
            return f"{journal.role} patched {journal.layers} of {expected_layers} layers" + "".join(
                f"; {r}" for r in refused
            )
        if not journal.calls:
            return f"{journal.role} patched {journal.layers} layers, and the op never ran"
    return None
