"""One `create`: checks the request, plans it, stores its layers.

Nothing is stored before every file's header was read and the whole plan stands.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from ollama_distributed.base.errors import BlobNotFound, Invalid, InvalidName, ModelNotFound, Unsupported
from ollama_distributed.catalog.entries import Entry
from ollama_distributed.catalog.ports import Store
from ollama_distributed.catalog.wire import CreateRequest, CreateStatus
from ollama_distributed.models.create import BaseModel, Changes, File, NewLayer, Plan, check_paths, plan
from ollama_distributed.models.manifest import (
    CONFIG_TYPE,
    Layer,
    Manifest,
    ModelConfig,
    encode_config,
    encode_manifest,
)
from ollama_distributed.models.names import BlobId, ModelName


class Creation:
    """Use in order: `prepare`, `needed`, `write_layers`, `check_complete`, `manifest_bytes`."""

    def __init__(
        self,
        store: Store,
        request: CreateRequest,
        find: Callable[[ModelName], Awaitable[Entry | None]],
    ) -> None:
        self._store = store
        self._request = request
        self._find = find
        self._statuses: list[str] = []
        self._plan = Plan(layers=(), config=ModelConfig())
        self._layers: list[Layer] = []
        self._config = Layer(media_type=CONFIG_TYPE, digest="", size=0)
        self.made: set[BlobId] = set()
        """Blobs that this create stored; to be removed if it fails."""
        try:
            self.target = ModelName.parse(request.target)
        except InvalidName as exc:
            raise InvalidName("invalid model name") from exc

    async def prepare(self) -> None:
        """Check everything and plan.

        Raises:
            Invalid, InvalidName, InvalidModel, Unsupported: the request cannot be served.
            ModelNotFound: the base is not here. BlobNotFound: a file was not uploaded.
        """
        request = self._request
        _check_supported(request)
        for given in (request.files, request.adapters):
            check_paths(given or {})
            for digest in (given or {}).values():
                BlobId.parse(digest)
        base = await self._base() if request.from_ else None
        if base is None and request.files is None:
            raise Invalid("neither 'from' or 'files' was specified")
        if base is None and not request.files:
            raise Invalid("no files provided to convert")
        license_ = request.license
        self._plan = plan(
            base=base,
            files=await self._files(request.files or {}) if base is None else (),
            adapters=await self._files(request.adapters or {}),
            changes=Changes(
                template=request.template,
                system=request.system,
                license=(license_,) if isinstance(license_, str) else tuple(license_ or ()),
                parameters=request.parameters or {},
                messages=tuple(request.messages or ()),
                renderer=request.renderer,
                parser=request.parser,
                requires=request.requires.removeprefix("v"),
            ),
        )

    def needed(self) -> set[BlobId]:
        """Blobs that exist already and must stay until the manifest names them."""
        return {layer.blob for layer in self._plan.layers if isinstance(layer, Layer)}

    async def write_layers(self) -> AsyncIterator[CreateStatus]:
        for status in self._statuses:
            yield CreateStatus(status=status)
        if self._plan.detected:
            yield CreateStatus(status=f"using autodetected template {self._plan.detected}")
        for layer in self._plan.layers:
            if isinstance(layer, NewLayer):
                blob, made = await self._put(layer.content)
                stored = Layer(media_type=layer.media_type, digest=blob.digest, size=len(layer.content))
            else:
                stored, made = layer, False
            self._layers.append(stored)
            yield CreateStatus(status=f"{'creating new' if made else 'using existing'} layer {stored.digest}")
        content = encode_config(self._plan.config)
        blob, _ = await self._put(content)
        self._config = Layer(media_type=CONFIG_TYPE, digest=blob.digest, size=len(content))

    async def check_complete(self) -> None:
        """Under the catalogue's lock: a delete may have taken a small layer that was shared."""
        for planned, stored in zip(self._plan.layers, self._layers, strict=True):
            if await self._store.blob_size(stored.blob) is not None:
                continue
            if isinstance(planned, Layer):
                raise BlobNotFound(f'blob "{stored.digest}" not found')
            await self._put(planned.content)
        await self._put(encode_config(self._plan.config))

    def manifest_bytes(self) -> bytes:
        return encode_manifest(Manifest(config=self._config, layers=tuple(self._layers)))

    async def _put(self, content: bytes) -> tuple[BlobId, bool]:
        blob, made = await self._store.put_bytes(content)
        if made:
            self.made.add(blob)
        return blob, made

    async def _base(self) -> BaseModel:
        name = ModelName.parse(self._request.from_)
        entry = await self._find(name)
        if entry is None:
            raise ModelNotFound(f"model '{self._request.from_}' not found")
        return BaseModel(
            display=entry.spec.display,
            layers=tuple(
                Layer(
                    media_type=layer.media_type,
                    digest=layer.digest,
                    size=layer.size,
                    from_=entry.spec.display,
                    name=layer.name,
                )
                for layer in entry.manifest.layers
            ),
            config=entry.config,
            parameters=entry.stored_parameters,
            template=entry.spec.template,
        )

    async def _files(self, files: Mapping[str, str]) -> tuple[File, ...]:
        """The uploaded files with their headers; the order of names is the order of layers."""
        found: list[File] = []
        for path, digest in sorted(files.items()):
            if path.endswith((".safetensors", ".bin", ".pth")):
                raise Unsupported(
                    f"{path} is not in GGUF format and cannot be converted here; "
                    "convert it first with llama.cpp's convert_hf_to_gguf.py"
                )
            self._statuses.append("parsing GGUF")
            blob = BlobId.parse(digest)
            found.append(File(path=path, blob=blob, header=await self._store.read_header(blob)))
        return tuple(found)


def _check_supported(request: CreateRequest) -> None:
    if request.quantize or request.quantization or request.draft_quantize:
        raise Unsupported(
            "this server cannot quantize models; quantize the file first with llama.cpp's llama-quantize"
        )
    if request.draft_files:
        raise Unsupported("DRAFT models are not supported")
    if request.info:
        raise Unsupported("'info' cannot be set; it is read from the model's own file")
    if request.remote_host:
        raise Unsupported("models on remote hosts are not supported; configure the host as an engine")
