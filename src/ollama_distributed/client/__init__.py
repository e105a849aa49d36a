"""The SDK: `Client` (asyncio), `SyncClient`, `WSClient`, requests and answers, a class per error.

Each name is imported from its module on first use: the command line starts with parts of this
package alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ollama_distributed.base.cluster import (
        ClusterAnswer,
        ConfigAnswer,
        LeaderAnswer,
        NewToken,
        NodeRow,
        NodeUsage,
        TokenRow,
    )
    from ollama_distributed.client.aio import Client
    from ollama_distributed.client.errors import (
        BadAnswer,
        BlobNotFound,
        BodyTooLarge,
        BudgetSpent,
        Cancelled,
        ClientError,
        Conflict,
        ConnectionFailed,
        ConnectionLost,
        ContextExceeded,
        DeadlineExceeded,
        DigestMismatch,
        DiskFull,
        EngineError,
        Forbidden,
        ForeignHost,
        HeadersTooLarge,
        Internal,
        Invalid,
        InvalidModel,
        InvalidName,
        LoadFailed,
        Malformed,
        MethodNotAllowed,
        MissingBody,
        ModelNotFound,
        NoCapacity,
        NotFound,
        NotOffered,
        Quarantined,
        QueueFull,
        RateLimited,
        RegistryError,
        RequestTimeout,
        RunnerDied,
        TimedOut,
        TooManyAttempts,
        Unauthenticated,
        Unavailable,
        Unsupported,
        UnsupportedMedia,
    )
    from ollama_distributed.client.listening import WSClient, WSMessage
    from ollama_distributed.client.sync import SyncClient
    from ollama_distributed.client.wire import (
        ChatRequest,
        ChatResponse,
        CreateRequest,
        EmbeddingsRequest,
        EmbeddingsResponse,
        EngineInfo,
        GenerateRequest,
        GenerateResponse,
        Health,
        LoadedModel,
        Logprob,
        Message,
        ModelDetails,
        ModelInfo,
        Progress,
        RerankRequest,
        RerankResponse,
        RerankResult,
        ShowResponse,
        ToolCall,
        ToolFunction,
        Transfer,
        TransferList,
        Version,
    )

__all__ = [
    "BadAnswer",
    "BlobNotFound",
    "BodyTooLarge",
    "BudgetSpent",
    "Cancelled",
    "ChatRequest",
    "ChatResponse",
    "Client",
    "ClientError",
    "ClusterAnswer",
    "ConfigAnswer",
    "Conflict",
    "ConnectionFailed",
    "ConnectionLost",
    "ContextExceeded",
    "CreateRequest",
    "DeadlineExceeded",
    "DigestMismatch",
    "DiskFull",
    "EmbeddingsRequest",
    "EmbeddingsResponse",
    "EngineError",
    "EngineInfo",
    "Forbidden",
    "ForeignHost",
    "GenerateRequest",
    "GenerateResponse",
    "HeadersTooLarge",
    "Health",
    "Internal",
    "Invalid",
    "InvalidModel",
    "InvalidName",
    "LeaderAnswer",
    "LoadFailed",
    "LoadedModel",
    "Logprob",
    "Malformed",
    "Message",
    "MethodNotAllowed",
    "MissingBody",
    "ModelDetails",
    "ModelInfo",
    "ModelNotFound",
    "NewToken",
    "NoCapacity",
    "NodeRow",
    "NodeUsage",
    "NotFound",
    "NotOffered",
    "Progress",
    "Quarantined",
    "QueueFull",
    "RateLimited",
    "RegistryError",
    "RequestTimeout",
    "RerankRequest",
    "RerankResponse",
    "RerankResult",
    "RunnerDied",
    "ShowResponse",
    "SyncClient",
    "TimedOut",
    "TokenRow",
    "TooManyAttempts",
    "ToolCall",
    "ToolFunction",
    "Transfer",
    "TransferList",
    "Unauthenticated",
    "Unavailable",
    "Unsupported",
    "UnsupportedMedia",
    "Version",
    "WSClient",
    "WSMessage",
]

_CLIENTS = {
    "Client": "client.aio",
    "SyncClient": "client.sync",
    "WSClient": "client.listening",
    "WSMessage": "client.listening",
}
_STRUCTS = ("client.wire", "client.errors", "base.cluster")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in (_CLIENTS[name],) if name in _CLIENTS else _STRUCTS:
        found = getattr(import_module(f"ollama_distributed.{module}"), name, None)
        if found is not None:
            return found
    raise AssertionError(f"{name} is in __all__ and in no module")
