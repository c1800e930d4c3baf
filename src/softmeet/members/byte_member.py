"""The former place of :class:`softmeet.readers.bytes.byte_member.ByteMember`, which works and warns until 0.4.0."""

import warnings

from softmeet.readers.bytes.byte_member import ByteMember as ByteMember

warnings.warn(
    "softmeet.members.byte_member is softmeet.readers.bytes.byte_member now: import ByteMember from there",
    DeprecationWarning,
    stacklevel=2,
)
