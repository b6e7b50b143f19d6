"""A plugin whose import fails."""

import no_such_library

BACKBONES_API = no_such_library.API
