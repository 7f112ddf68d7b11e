from .attribution import *
from .relevance import *
from .scores import *
from .importance import *
