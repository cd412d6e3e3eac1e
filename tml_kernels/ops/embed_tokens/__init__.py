from .api import embed_tokens as embed_tokens
from .kinds import TokenKind as TokenKind
