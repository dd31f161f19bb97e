"""features.py - which virtio features an instance offers.

Theory      Everything that is served is offered, unless the operator takes it away (--features),
            to work around a driver or to measure what a feature is worth. What cannot be had
            without another goes with it (vhost_user.REQUIREMENTS).
Names       As in the virtio specification, in small letters, without VIRTIO_NET_F_ and VIRTIO_F_.
Limits      VERSION_1 stays: legacy devices are not served. Multiqueue follows from --queues.
Ownership   Pure.
Errors      UsageError for a name that is not served, and for one that is asked for by name while
            what it cannot be had without is taken away.
"""

from __future__ import annotations

from control.vhost_user import REQUIREMENTS, VirtioFeature, consistent, feature_names
from control.wanted import UsageError

SERVED = {
    feature.name.lower(): feature
    for feature in (
        VirtioFeature.CSUM,
        VirtioFeature.GUEST_CSUM,
        VirtioFeature.GUEST_TSO4,
        VirtioFeature.GUEST_TSO6,
        VirtioFeature.HOST_TSO4,
        VirtioFeature.HOST_TSO6,
        VirtioFeature.HOST_ECN,
        VirtioFeature.GUEST_ECN,
        VirtioFeature.HOST_USO,
        VirtioFeature.GUEST_USO4,
        VirtioFeature.GUEST_USO6,
        VirtioFeature.MRG_RXBUF,
        VirtioFeature.MTU,
        VirtioFeature.INDIRECT_DESC,
        VirtioFeature.EVENT_IDX,
        VirtioFeature.RING_PACKED,
        VirtioFeature.IN_ORDER,
        VirtioFeature.NOTIFICATION_DATA,
    )
    if feature.name
}


def offered(text: str, queue_pairs: int) -> int:
    """The features to offer: all that are served, as `text` changes them.

    `text` is a list of -NAME (without) and NAME or +NAME (with), separated by commas; the last word
    on a name counts. "none" takes all away.
    """
    chosen = dict.fromkeys(SERVED, True)
    asked: set[str] = set()
    for word in filter(None, text.split(",")):
        name = word.lstrip("+-")
        if word == "none":
            chosen, asked = dict.fromkeys(SERVED, False), set()
        elif name not in SERVED or len(word) - len(name) > 1:
            raise UsageError(f"--features: {word!r}: there are {', '.join(SERVED)}, and none")
        else:
            chosen[name] = word[0] != "-"
            (asked.add if chosen[name] else asked.discard)(name)
    bits = VirtioFeature.VERSION_1
    if queue_pairs > 1:
        bits |= VirtioFeature.NET_MQ | VirtioFeature.CTRL_VQ
    for name, wanted in chosen.items():
        bits |= SERVED[name] if wanted else 0
    bits = VirtioFeature(consistent(bits))
    for name in asked:
        if not bits & SERVED[name]:
            raise UsageError(f"--features: {name} cannot be had without {_needed(SERVED[name])}")
    return bits


def _needed(feature: VirtioFeature) -> str:
    """What a feature cannot be had without, in words."""
    (needed,) = (needed for one, needed in REQUIREMENTS if one == feature)
    return " or ".join(feature_names(needed).lower().split())
