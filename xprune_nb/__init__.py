__version__ = "0.1.0"

import os
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE') # before any room imports torch; why, 00_data says
