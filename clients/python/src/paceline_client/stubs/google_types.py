"""The public Google messages that paceline.v1 needs, from wherever they can be had.

They are those of googleapis-common-protos where that is installed, and else the copies bundled with this
package. Each file is registered once: two different copies of one in the same process would be an error of the
protobuf runtime.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline_client.stubs.bundled.google.rpc import error_details_pb2, status_pb2
    from paceline_client.stubs.bundled.google.type import money_pb2
else:
    try:
        from google.rpc import error_details_pb2
    except ImportError:
        from paceline_client.stubs.bundled.google.rpc import error_details_pb2
    try:
        from google.rpc import status_pb2
    except ImportError:
        from paceline_client.stubs.bundled.google.rpc import status_pb2
    try:
        from google.type import money_pb2
    except ImportError:
        from paceline_client.stubs.bundled.google.type import money_pb2

__all__ = ["error_details_pb2", "money_pb2", "status_pb2"]
