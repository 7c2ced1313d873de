"""The one table of caps. Every parser and every buffer that a stranger can fill reads its bound here."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

# Framing
# Most payload bytes of one frame, so that 4 MiB of fp32 as int8 fit, scales and all: another frame costs a
# quarter of a millisecond at either end. 256 KiB frames cost 1.5 times the CPU a byte.
FRAME_BYTES = 1 * MIB + 64 * KIB
FIRST_FRAME_BYTES = (
    128 * KIB
)  # where a connection starts; it adapts, so that a frame takes a fraction of a second
LEAST_FRAME_BYTES = 32 * KIB  # a frame that is not the last of its message has at least these
HEADER_BYTES = 64 * KIB  # one encoded message header
MESSAGE_NAME_BYTES = 96  # the name of a message type
ABORT_TEXT_BYTES = 1 * KIB
STREAMS_PER_PEER = 256  # concurrently open, inbound
STREAMS_PER_TOKEN = 1024  # one holder may run many peers, but not fill everything
STREAMS_IN_ALL = 4096
CONNECTIONS = 1024  # outgoing; beyond this idle ones are closed, the least recently used first

# A volunteer's limit on what is sent: below 600 kbit/s the least frame takes so long that neither the
# limit holds within 5 % over ten seconds, nor a receiver hears from each of several streams in time
LEAST_UPLOAD_BYTES_PER_S = 75_000

# Silence on a transfer that should be moving (design section 7)
SUSPECT_AFTER_S = 2.0
ABORT_AFTER_S = 5.0
FRAME_S = 30.0  # longest time one frame may take while its connection moves other bytes
CONNECT_S = 5.0
LINGER_S = 60.0  # what a remote handler gets to finish after its caller's END
KEEPALIVE_S = 10.0  # an idle connection is probed this often ...
KEEPALIVE_ANSWER_S = 5.0  # ... and is dead when the probe is not answered
RETRY_LEAST_S = 0.02  # who is full is left alone so long at least: else one that says 0 is asked for ever
RETRY_MOST_S = 60.0

# Records and the directory
RECORD_BYTES = 4 * KIB
RECORD_TTL_S = 30.0
RECORD_TTL_MAX_S = 120.0
RECORD_FUTURE_S = 60.0  # how far ahead another peer's clock may be
RECORDS_HELD = 20_000
ADDRESSES_PER_PEER = 8
CLOCK_SKEW_S = 3600.0  # a leaf is valid this long before it was made

# Trust
LEAF_HOURS = 24
CERTIFICATE_BYTES = 2 * KIB
CHAIN_LENGTH = 3
TOKEN_CHARACTERS = 4 * KIB
BOOTSTRAP_ADDRESSES = 8
REVOCATIONS = 10_000
AMENDMENTS_BYTES = 32 * KIB  # of a list with as many settings and errands as fit
AMENDED_SETTINGS = 128
ERRANDS = 32  # the oldest go first: processes that they name are long gone
VERIFIED_CHAINS = 4096  # remembered, so that a reconnecting peer costs no signature checks; 1.5 KB each

# Inference
DRAFT_TOKENS = 64  # guessed ahead of a session's text: so many positions more may be under way, or in vain

# Swarm
STAGES = 256
ROSTER = 1024
PARTS = 4096
NAME_CHARACTERS = 32
SPEC_BYTES = 64 * KIB
TOKENIZER_BYTES = 64 * MIB  # the largest in use has 34 MB
