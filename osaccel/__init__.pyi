from osaccel.adaptors import DitCacheAdaptor as DitCacheAdaptor
from osaccel.adaptors import DitCacheConfig as DitCacheConfig
from osaccel.adaptors import DitCacheSearchConfig as DitCacheSearchConfig
from osaccel.adaptors import ReStepAdaptor as ReStepAdaptor
from osaccel.adaptors import ReStepSearchConfig as ReStepSearchConfig

__version__: str
