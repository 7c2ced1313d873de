"""Debian's chromium, driven by Playwright, for the tests of the page."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect

expect.set_options(timeout=15_000)  # two cores, and whatever else the machine does
NAMES = ("chromium", "chromium-browser", "google-chrome")


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """One without a window. Raises RuntimeError where none is installed."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise RuntimeError(
            f"the tests of the page need a browser ({', '.join(NAMES)}) and there is none\n"
            "install it with: apt-get install -y --no-install-recommends chromium fonts-dejavu-core"
        )
    async with async_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]  # root in a container
        found = await playwright.chromium.launch(executable_path=path, args=options)
        try:
            yield found
        finally:
            await found.close()


async def sign_in(context: BrowserContext, link: str) -> Page:
    """The page behind a login link, drawn."""
    page = await context.new_page()
    await page.goto(link)
    await page.get_by_role("button", name="Sign in").click()
    await expect(page.locator(".sentence")).to_be_visible(timeout=20_000)
    return page
