"""Which filters stay, and what is the network without the others?"""
from .plan import *
from .plan import _of
from .cut import *
from .unstructured import *
