"""The checkpoints that every family is held to; a family is tested by being listed in one of these files."""

from tests.families.cases.audio import CASES as AUDIO
from tests.families.cases.case import Case
from tests.families.cases.decoders import CASES as DECODERS
from tests.families.cases.encoders import CASES as ENCODERS
from tests.families.cases.marian import CASES as MARIAN
from tests.families.cases.reformer import CASES as REFORMER
from tests.families.cases.seq2seq import CASES as SEQ2SEQ
from tests.families.cases.sparse import CASES as SPARSE
from tests.families.cases.vision import CASES as VISION

CASES: tuple[Case, ...] = (*DECODERS, *ENCODERS, *AUDIO, *MARIAN, *REFORMER, *SEQ2SEQ, *SPARSE, *VISION)
