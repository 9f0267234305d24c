"""A relay as applications write it: FastAPI, httpx's client, StreamingResponse, uvicorn. A contender of `gateway.py`."""

from __future__ import annotations

import argparse

import fastapi
import httpx
import uvicorn
from fastapi.responses import StreamingResponse


def application(upstream: str) -> fastapi.FastAPI:
    app = fastapi.FastAPI()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    client = httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)

    @app.post("/v1/chat/completions")
    async def relay(request: fastapi.Request) -> StreamingResponse:
        headers = {"content-type": "application/json"}
        asked = client.build_request(
            "POST", f"{upstream}/chat/completions", content=await request.body(), headers=headers
        )
        answer = await client.send(asked, stream=True)

        async def body():
            try:
                async for data in answer.aiter_raw():
                    yield data
            finally:
                await answer.aclose()

        return StreamingResponse(body(), answer.status_code, media_type=answer.headers.get("content-type"))

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    options = parser.parse_args()
    uvicorn.run(
        application(options.upstream),
        host="127.0.0.1",
        port=options.port,
        log_level="warning",
        access_log=False,
    )
