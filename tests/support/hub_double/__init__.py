"""A test double of the Hugging Face Hub for loopback. It is not the Hub, and nothing that reaches it is published.

It answers what the ordinary client asks on the way create, preupload, LFS or Xet, commit, refs, tags, resolve, with the
status codes, headers and error bodies that client reads, and it can be told to fail. What it shows is that our side of
the conversation is right as far as that client checks it; how huggingface.co itself behaves (its CDN, its rate limits,
its validation of cards) is seen only there.

    with HubDouble() as hub:
        hub.add_account('alice', 'hf_alice')
        …                                   # a client with HF_ENDPOINT=hub.url and HF_TOKEN=hf_alice
        hub.fail('POST', '/commit/', status=503)

Two servers listen on 127.0.0.1: `url` is the Hub, `cdn_url` (by the name localhost, as storage is another host) the
storage that it redirects to, which refuses any request that carries the Hub's token.
"""

from .server import Fault, HubDouble, Request

__all__ = ['Fault', 'HubDouble', 'Request']
