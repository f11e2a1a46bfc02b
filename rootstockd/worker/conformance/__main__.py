"""`python -m rootstockd.worker.conformance SPEC`."""

import sys

from rootstockd.worker.conformance import main

sys.exit(main(sys.argv[1:]))
