"""`python -m nexus_adapters.cli`, for launchers that run a module."""

import sys

from nexus_adapters.cli import main

sys.exit(main())
