"""Chat templates: what runs them within bounds, and strings that know who said them."""

from polyformer.data.templates.origin import Text, said, spans
from polyformer.data.templates.run import Template

__all__ = ["Template", "Text", "said", "spans"]
