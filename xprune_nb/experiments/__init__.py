from .progress import *
from .run import *
from .store import *
from .warm import *
